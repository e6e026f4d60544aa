import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion.data.tokenizer import Tokenizer
from transfusion.sequence import SpecialTokens

TEXTS = ["the red apple and the green apple", "a cat face, a dog face", "naïve café 🍎"] * 4
TOKENIZER = Tokenizer.train(TEXTS, 300)


@given(st.text())
@settings(deadline=None)
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("name", ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>"])
def test_special_tokens_have_their_ids_and_never_come_from_text(name, tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode(f"a{name}b {name}")
        assert ids.min() > 4
        assert tokenizer.decode(ids) == f"a{name}b {name}"
    assert TOKENIZER.special == SpecialTokens(pad=0, bos=1, eos=2, boi=3, eoi=4)


def test_encoding_is_int64_and_merges_what_is_frequent():
    ids = TOKENIZER.encode("the red apple")
    assert ids.dtype == torch.int64 and ids.ndim == 1 and len(ids) < len("the red apple")
    assert TOKENIZER.encode("").shape == (0,) and TOKENIZER.encode("").dtype == torch.int64
    assert ids.max() < TOKENIZER.vocab_size <= 300


def test_special_tokens_say_nothing_when_decoded():
    special = torch.tensor([1, 3, 4, 2, 0])
    assert TOKENIZER.decode(torch.cat([special[:1], TOKENIZER.encode("cat"), special[1:]])) == "cat"
    assert TOKENIZER.decode([]) == ""


def test_training_is_deterministic_and_saving_is_exact(tmp_path):
    files = []
    for number, tokenizer in enumerate((TOKENIZER, Tokenizer.train(iter(TEXTS), 300))):
        tokenizer.save(tmp_path / f"{number}.json")
        files.append((tmp_path / f"{number}.json").read_bytes())
    assert files[0] == files[1]
    Tokenizer.load(tmp_path / "0.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == files[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "1.json", "again.json"]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, fraction):
    file = tmp_path / "tokenizer.json"
    TOKENIZER.save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ValueError, match=r"tokenizer\.json is truncated"):
        Tokenizer.load(file)


def _without_specials(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    file = tmp_path / "other.json"
    Backend(models.BPE()).save(str(file))
    return file.read_text()


@pytest.mark.parametrize("foreign", ["{}", "[1, 2]", json.dumps({"model": {"type": "BPE"}}), _without_specials])
def test_a_foreign_file_is_an_error_that_names_it(tmp_path, foreign):
    content = foreign if isinstance(foreign, str) else foreign(tmp_path)
    (tmp_path / "foreign.json").write_text(content)
    with pytest.raises(ValueError, match=r"foreign\.json is not a tokenizer"):
        Tokenizer.load(tmp_path / "foreign.json")


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=260 .* >= 261"):
        Tokenizer.train(TEXTS, 260)
    assert Tokenizer.train([], 261).vocab_size == 261
