import json
import logging
import random
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction
from itertools import islice
from math import lcm

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from transfusion.data.drafting import Mixture, caption_ids
from transfusion.data.loader import Loader, LoaderConfig
from transfusion.data.sources import CaptionedImage, FolderSource, SampleError
from transfusion.data.tokenizer import Tokenizer

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "round", "square", "flat"]
TOKENIZER = Tokenizer.train([" ".join(WORDS)] * 3, 320)
TEXTS = [" ".join(random.choices(WORDS, k=random.randint(5, 60))) for _ in range(12)]
CONFIG = LoaderConfig(rows=6, row_length=48, image_size=8, patch_size=4, seed=7)  # 4 tokens an image


class NoiseImages:
    """`count` images, each of one colour that tells its index, and captions of 1 to 6 words; some unreadable."""

    def __init__(self, count: int, broken: tuple[int, ...] = (), words: int | None = None) -> None:
        self.names = [f"image {i}" for i in range(count)]
        self.captions = [" ".join(random.choices(WORDS, k=words or random.randint(1, 6))) for _ in range(count)]
        self.skipped: list[tuple[str, str]] = []
        self.broken = broken

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionedImage:
        if index in self.broken:
            raise SampleError(self.names[index], "broken on purpose")
        return CaptionedImage(self.captions[index], PILImage.new("RGB", (9, 8), (index, 0, 0)), self.names[index])


def _indices(batch) -> list[int]:
    return ((batch.latents[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def _same(a, b) -> bool:
    tensors = [f.name for f in fields(a) if f.name != "mask"]
    masks = torch.equal(a.mask.query_start, b.mask.query_start) and torch.equal(a.mask.query_end, b.mask.query_end)
    return masks and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_a_batch_is_a_function_of_seed_step_and_rank():
    seed = random.getrandbits(31)
    source = NoiseImages(30)
    loader, twin = (Loader(replace(CONFIG, seed=seed), TOKENIZER, source, TEXTS) for _ in range(2))
    batches = [loader.batch(step) for step in range(12)]
    for step in random.sample(range(12), 12):
        assert _same(twin.batch(step), batches[step]), f"seed {seed} step {step}"
    assert len({batch.noise_seed.item() for batch in batches}) == 12
    other = Loader(replace(CONFIG, seed=seed + 1), TOKENIZER, source, TEXTS)
    assert not _same(other.batch(0), batches[0])
    assert not _same(Loader(replace(CONFIG, seed=seed), TOKENIZER, source, TEXTS, None, 1, 2).batch(0), batches[0])


def test_batches_are_made_on_the_host_whatever_torchs_default_device(elsewhere):
    source, found = NoiseImages(30), []
    wanted = [Loader(CONFIG, TOKENIZER, source, TEXTS).batch(step) for step in range(2)]
    with elsewhere():
        found = [Loader(CONFIG, TOKENIZER, source, TEXTS).batch(step) for step in range(2)]
    assert all(map(_same, found, wanted))


@pytest.mark.parametrize("start", [0, 1, 9])
def test_iterate_goes_on_from_the_state_which_is_a_row_number(start):
    loader = Loader(CONFIG, TOKENIZER, NoiseImages(30), TEXTS)
    for _ in range(2):  # what was prepared ahead of the first does not count
        loader.load_state_dict({"row": start * CONFIG.rows, "sources": [[], []]})
        for step, batch in zip(range(start, start + 5), loader.iterate(prefetch=3), strict=False):
            assert _same(batch, loader.batch(step))
            assert loader.state_dict()["row"] == (step + 1) * CONFIG.rows


def test_iterate_hands_errors_on_and_stops_its_thread(monkeypatch):
    import threading

    loader = Loader(CONFIG, TOKENIZER, NoiseImages(30), TEXTS)
    batches = loader.iterate()
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    monkeypatch.setattr(loader, "_prepare", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.iterate())
    with pytest.raises(ValueError, match="prefetch"):
        next(loader.iterate(prefetch=0))


def test_ranks_draw_different_noise():
    loaders = [Loader(CONFIG, TOKENIZER, NoiseImages(30), TEXTS, rank=rank, world_size=4) for rank in range(4)]
    assert len({loader.batch(step).noise_seed.item() for loader in loaders for step in range(3)}) == 12


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_without_overlap_or_loss(world_size):
    config = replace(CONFIG, text_fraction=0.0, rows=1)
    source = NoiseImages(40)
    loaders = [Loader(config, TOKENIZER, source, rank=rank, world_size=world_size) for rank in range(world_size)]
    epoch = len(loaders[0]._images[0].plan)
    seen = Counter()
    for row in range(epoch):
        seen.update(_indices(loaders[row % world_size].batch(row // world_size)))
    assert seen == Counter(range(40))


def test_every_image_and_every_text_token_is_used_equally_often():
    config = replace(CONFIG, rows=1, caption_dropout=0.0)
    loader = Loader(config, TOKENIZER, NoiseImages(25), TEXTS)
    images, targets, text_targets = Counter(), Counter(), Counter()
    for text in TEXTS:
        text_targets.update([*TOKENIZER.encode(text).tolist(), TOKENIZER.special.eos])
    for row in range(2 * max(len(loader._images[0].plan), len(loader._texts[0].plan))):
        batch = loader.batch(row)
        if row % 2 == 0 and row // 2 < len(loader._images[0].plan):
            images.update(_indices(batch))
        if row % 2 == 1 and row // 2 < len(loader._texts[0].plan):
            targets.update(batch.text_targets.tolist())
            assert batch.num_images == 0
    assert images == Counter(range(25)) and targets == text_targets


def _plan_rows(rows) -> int:
    return len(rows[0].plan) if rows else 1


@pytest.mark.parametrize("fraction", [Fraction(0), Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), Fraction(1)])
def test_the_mix_is_exact(fraction):
    config = replace(CONFIG, text_fraction=float(fraction), caption_dropout=0.0, rows=1)
    loader = Loader(config, TOKENIZER, NoiseImages(8), TEXTS[:3])
    steps = fraction.denominator * lcm(_plan_rows(loader._images), _plan_rows(loader._texts))
    batches = list(islice(loader.iterate(), steps))  # whole epochs of both plans
    assert sum(batch.num_images == 0 for batch in batches) == steps * fraction


def test_packing_fills_the_rows():
    texts = [" ".join(random.choices(WORDS, k=random.randint(5, 60))) for _ in range(200)]
    loader = Loader(replace(CONFIG, row_length=128), TOKENIZER, NoiseImages(200), texts)
    assert min(rows.plan.fill for rows in (*loader._images, *loader._texts)) > 0.9


def test_images_per_row_fixes_the_number_of_images():
    config = replace(CONFIG, text_fraction=0.5, images_per_row=2, row_length=60)
    loader = Loader(config, TOKENIZER, NoiseImages(25), TEXTS)
    assert {loader.batch(step).num_images for step in range(30)} == {6}


def test_orders_and_dropout_have_their_probabilities_and_limits():
    config = replace(CONFIG, text_fraction=0.0, rows=40, caption_first=0.7, caption_dropout=0.25)
    loader = Loader(config, TOKENIZER, NoiseImages(200))
    special = TOKENIZER.special
    kinds, late = Counter(), 0
    for step in range(15):
        batch = loader.batch(step)
        ids = batch.token_ids.flatten().tolist()
        for image in range(batch.num_images):
            first = int(batch.image_rows[4 * image])
            if ids[first - 2] != special.bos:
                kinds["caption first"] += 1
            elif [*ids, special.pad][first + 5] in (special.bos, special.pad):
                kinds["dropped"] += 1
            else:
                kinds["image first"] += 1
                assert batch.times[image] <= 0.5
            late += int(batch.times[image] > 0.5)
    total = sum(kinds.values())
    for kind, probability in {"dropped": 0.25, "caption first": 0.75 * 0.7, "image first": 0.75 * 0.3}.items():
        deviation = (probability * (1 - probability) / total) ** 0.5
        assert abs(kinds[kind] / total - probability) < 5 * deviation, kinds
    assert late > 0


def test_no_dropout_and_caption_first_always():
    config = replace(CONFIG, text_fraction=0.0, caption_first=1.0, caption_dropout=0.0)
    batch = Loader(config, TOKENIZER, NoiseImages(20)).batch(0)
    before = batch.token_ids.flatten()[batch.image_rows.view(-1, 4)[:, 0] - 2]
    assert (before != TOKENIZER.special.bos).all()


def test_captions_stay_with_their_images():
    config = replace(CONFIG, text_fraction=0.0, caption_first=1.0, caption_dropout=0.0)
    source = NoiseImages(20)
    loader = Loader(config, TOKENIZER, source)
    batch = loader.batch(3)
    ids = batch.token_ids.flatten().tolist()
    for image, index in enumerate(_indices(batch)):
        end = int(batch.image_rows[4 * image]) - 1
        start = max(i for i in range(end) if ids[i] == TOKENIZER.special.bos)
        assert TOKENIZER.decode(ids[start:end]) == source.captions[index]


@pytest.mark.parametrize("images_per_row", [None, 2])
def test_unreadable_images_are_replaced_counted_and_named(images_per_row, caplog):
    config = replace(CONFIG, text_fraction=0.0, row_length=60, images_per_row=images_per_row)
    source = NoiseImages(30, broken=(3, 4, 17))
    loader, twin = Loader(config, TOKENIZER, source), Loader(config, TOKENIZER, source)
    with caplog.at_level(logging.WARNING):
        batches = [loader.batch(step) for step in range(12)]
    seen = {index for batch in batches for index in _indices(batch)}
    assert seen == set(range(30)) - {3, 4, 17}
    assert sorted(loader.skipped) == [(f"image {i}", "broken on purpose") for i in (17, 3, 4)]
    assert all(caplog.text.count(f"image {i}: broken on purpose") == 1 for i in (3, 4, 17))
    for step in reversed(range(12)):  # the replacement does not depend on what was met before
        assert _same(twin.batch(step), batches[step])
    if images_per_row:
        assert {batch.num_images for batch in batches} == {2 * config.rows}


def test_a_corrupt_file_does_not_kill_the_run(tmp_path):
    pixels = np.random.default_rng().integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("a.png", "b.png", "c.png"):
        PILImage.fromarray(pixels).save(tmp_path / name)
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    entries = [{"image": name, "caption": "small"} for name in ("a.png", "b.png", "c.png")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    loader = Loader(replace(CONFIG, text_fraction=0.0), TOKENIZER, FolderSource(tmp_path, "all"))
    assert loader.batch(0).num_images > 0
    assert [name for name, _ in loader.skipped] == [str(tmp_path / "b.png")]


def test_images_of_one_name_in_two_folders_are_two(tmp_path):
    for number, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        folder.mkdir()
        PILImage.new("RGB", (16, 16), (100 * number, 0, 0)).save(folder / "a.png")
        PILImage.new("RGB", (16, 16), (100 * number + 50, 0, 0)).save(folder / "b.png")
        entries = [{"image": name, "caption": "small"} for name in ("a.png", "b.png", "gone.png")]
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    content = (tmp_path / "one/a.png").read_bytes()
    (tmp_path / "one/a.png").write_bytes(content[: len(content) // 2])
    sources = Mixture(tuple(FolderSource(tmp_path / name, "all") for name in ("one", "two")), (1.0, 1.0))
    config = replace(CONFIG, text_fraction=0.0)
    ranks = [Loader(config, TOKENIZER, sources, rank=rank, world_size=2) for rank in range(2)]
    batches = [loader.batch(step) for loader in ranks for step in range(4)]
    reds = {round(float(level + 1) * 127.5) for batch in batches for level in batch.latents[:, 0, 0, 0]}
    assert reds == {50, 100, 150}
    told = [sorted(name for name, _ in loader.skipped) for loader in ranks]
    gone = [str(tmp_path / name / "gone.png") for name in ("one", "two")]
    assert set(gone) <= set(told[0]) and set(told[1]).isdisjoint(gone)  # what all ranks come across is told once
    assert {name for names in told for name in names} == {*gone, str(tmp_path / "one/a.png")}


def test_when_nothing_can_be_read_the_run_ends_with_a_reason():
    loader = Loader(replace(CONFIG, text_fraction=0.0), TOKENIZER, NoiseImages(4, broken=(0, 1, 2, 3)))
    with pytest.raises(ValueError, match=r"none of the 4 images can be read.*broken on purpose"):
        loader.batch(0)


def test_a_caption_longer_than_the_context_is_skipped_counted_and_named():
    source = NoiseImages(6, words=2)
    source.captions[2] = "red " * 100
    loader = Loader(replace(CONFIG, text_fraction=0.0), TOKENIZER, source)
    assert [name for name, _ in loader.skipped] == ["image 2"]
    length = len(TOKENIZER.encode(source.captions[2]))
    assert f"the caption '{'red ' * 15}'... has {length} tokens, more than the {48 - 4 - 4}" in loader.skipped[0][1]
    assert {i for step in range(4) for i in _indices(loader.batch(step))} == {0, 1, 3, 4, 5}


def test_the_longest_caption_that_fits_is_kept_whole():
    source = NoiseImages(2)
    source.captions = ["Z" * 40, "Z" * 41]  # not in the training text, so one token a letter
    config = replace(CONFIG, text_fraction=0.0, caption_first=1.0, caption_dropout=0.0)
    loader = Loader(config, TOKENIZER, source)
    assert [name for name, _ in loader.skipped] == ["image 1"]
    batch = loader.batch(0)
    assert TOKENIZER.decode(batch.token_ids[0, 1:41]) == "Z" * 40
    assert (batch.token_ids != 0).sum() + 4 * batch.num_images == batch.token_ids.numel()


def test_direct_calls_raise_for_a_long_or_empty_caption():
    assert caption_ids(TOKENIZER, "red", 5).dtype == torch.int64
    with pytest.raises(ValueError, match=r"'red red red' has \d tokens, more than the 2"):
        caption_ids(TOKENIZER, "red red red", 2)
    with pytest.raises(ValueError, match="empty"):
        caption_ids(TOKENIZER, "", 2)


def test_the_autoencoder_makes_the_latents():
    class Halved:
        latent_channels, downscale = 5, 2

        def encode(self, images, generator=None):
            return images[:, :1, ::2, ::2].expand(-1, 5, -1, -1)

        def decode(self, latents):
            raise NotImplementedError

    loader = Loader(replace(CONFIG, text_fraction=0.0, patch_size=2), TOKENIZER, NoiseImages(9), autoencoder=Halved())
    batch = loader.batch(0)
    assert batch.latents.shape[1:] == (5, 4, 4)
    assert batch.image_rows.numel() == 4 * batch.num_images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"row_length": -4}, "row_length"),
        ({"images_per_row": 0}, "images_per_row"),
        ({"text_fraction": 1.5}, r"text_fraction must be in \[0, 1\], got 1\.5"),
        ({"caption_dropout": -0.1}, "caption_dropout"),
        ({"image_size": 9}, r"image_size=9 .* use e\.g\. 8"),
        ({"row_length": 8}, "row_length=8 holds no caption"),
        ({"images_per_row": 6}, "row_length=48 holds no caption beside 6"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Loader(replace(CONFIG, **changes), TOKENIZER, NoiseImages(3), TEXTS)


def test_sources_and_ranks_must_be_there():
    with pytest.raises(ValueError, match=r"text_fraction=0\.5 needs a text source"):
        Loader(CONFIG, TOKENIZER, NoiseImages(3))
    with pytest.raises(ValueError, match=r"text_fraction=0\.5 needs an image source"):
        Loader(CONFIG, TOKENIZER, None, TEXTS)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        Loader(CONFIG, TOKENIZER, NoiseImages(3), TEXTS, rank=2, world_size=2)
    with pytest.raises(ValueError, match="-1"):
        Loader(CONFIG, TOKENIZER, NoiseImages(3), TEXTS).batch(-1)
    with pytest.raises(ValueError, match="none of the 2 captioned images can be used; the first: the caption"):
        source = NoiseImages(2)
        source.captions = ["red " * 200] * 2
        Loader(replace(CONFIG, text_fraction=0.0), TOKENIZER, source)


def test_text_only_and_islice():
    loader = Loader(replace(CONFIG, text_fraction=1.0), TOKENIZER, texts=TEXTS)
    for batch in islice(loader.iterate(), 3):
        assert batch.num_images == 0 and len(batch.text_targets) > 0
