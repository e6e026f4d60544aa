"""Imported Llamas: the logits of `LlamaForCausalLM`, from memory and from disk; and the frozen text path."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from transfusion import Transfusion
from transfusion.config import RopeScaling
from transfusion.kernels import IntervalMask
from transfusion.kernels.testing import judge
from transfusion.model.llama import model_config
from transfusion.sequence import Image, SpecialTokens, Text, collate

transformers = pytest.importorskip("transformers")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
IMAGE = {"latent_channels": 3, "patch_size": 2}


def llama(**changes: Any) -> Any:
    """A randomly initialised one, with weights large enough that an error shows."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 60, "rms_norm_eps": 1e-6, "initializer_range": 0.3, "max_position_embeddings": 128}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def logits(model: Transfusion, token_ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(token_ids.shape[1])[None].expand_as(token_ids)
    x = model.embedding(token_ids)
    return model.head(model.transformer(x, positions, IntervalMask.causal(token_ids.shape[1])))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}],
    ids=["plain", "gqa", "tied", "llama3_rope"],
)
@torch.no_grad()
def test_logits_are_those_of_transformers(changes: dict[str, Any]) -> None:
    """To rounding: judged against transformers in float64, by the error of transformers in float32."""
    theirs = llama(**changes)
    ours = Transfusion.from_llama(theirs, **IMAGE)
    token_ids = torch.randint(60, (3, 70))
    eager = theirs(token_ids).logits
    # transformers computes rotary angles in float32 whatever the weights are, as here
    gold = theirs.double()(token_ids).logits
    verdict = judge(logits(ours, token_ids)[..., :60], eager, gold)
    assert verdict.passed and verdict.bound < 1e-3 * gold.abs().max(), verdict


def test_a_folder_is_read_like_the_model_in_memory(tmp_path: Path) -> None:
    theirs = llama(num_key_value_heads=2)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    folder, memory = Transfusion.from_llama(tmp_path, **IMAGE), Transfusion.from_llama(theirs, **IMAGE)
    assert folder.config == memory.config
    for (name, one), other in zip(folder.state_dict().items(), memory.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_new_tokens_come_after_the_vocabulary() -> None:
    theirs = llama(vocab_size=60)
    model = Transfusion.from_llama(theirs, **IMAGE)
    assert model.config.special == SpecialTokens(pad=60, bos=1, eos=2, boi=61, eoi=62)
    assert model.config.vocab_size == 63
    known = theirs.model.embed_tokens.weight
    assert torch.equal(model.embedding.weight[:60], known)
    for new in (60, 61, 62):
        assert torch.equal(model.embedding.weight[new], known.mean(0))
    own = SpecialTokens(pad=0, bos=1, eos=2, boi=3, eoi=4)
    assert Transfusion.from_llama(theirs, own, **IMAGE).config.vocab_size == 60


def test_it_trains_and_saves(tmp_path: Path) -> None:
    model = Transfusion.from_llama(llama(), **IMAGE)
    batch = training_batch(model)
    model(batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(Transfusion.from_pretrained(tmp_path)(batch).total, model(batch).total)
    again = Transfusion.from_llama(llama(), **IMAGE)
    assert torch.equal(again.codec.input.weight, model.codec.input.weight)
    assert not torch.equal(
        Transfusion.from_llama(llama(), seed=1, **IMAGE).codec.input.weight, model.codec.input.weight
    )


def training_batch(model: Transfusion) -> Any:
    special = model.config.special
    words, end = torch.tensor([special.bos, 7, 8]), torch.tensor([9, special.eos])
    document = (Text(words), Image(torch.randn(3, 4, 4)), Text(end))
    return collate([[document]], 14, 2, special, torch.Generator())


def test_a_frozen_text_path_does_not_move() -> None:
    model = Transfusion.from_llama(llama(), **IMAGE)
    assert model.freeze_text() is model  # so that it chains
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(training_batch(model)).total.backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("codec.")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not 'llama'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 24}, "head_dim 24 is not hidden_size / heads, 8"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"bos_token_id": None}, "bos_token_id is not set"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    described = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 60}
    described |= {"num_hidden_layers": 2, "intermediate_size": 48}
    assert model_config(described).kv_heads is None
    with pytest.raises(ValueError, match=message):
        model_config(described | changes)


def test_configs_of_transformers_4_are_read() -> None:
    described = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 60}
    described |= {"num_hidden_layers": 2, "intermediate_size": 48, "rope_theta": 5e5, "eos_token_id": [7, 8]}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    config = model_config(described | {"rope_scaling": scaling})
    assert config.rope_theta == 5e5 and config.special.eos == 7
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


def test_what_llama_determines_is_not_changed() -> None:
    with pytest.raises(ValueError, match="determine layers"):
        Transfusion.from_llama(llama(), layers=1)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Transfusion.from_llama(tmp_path)
    llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is truncated"):
        Transfusion.from_llama(tmp_path)
    described = llama().config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lack model\.layers\.2"):
        Transfusion.from_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match="not of the Llama that their config describes"):
        Transfusion.from_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"vocab_size": 40}))
    with pytest.raises(ValueError, match="tokens, their config has only 43"):
        Transfusion.from_llama(tmp_path)
