"""Edits, an image that a caption tells how to change: from files to documents, batches, figures and previews."""

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures

from transfusion import ModelConfig, Transfusion, cli
from transfusion.data import (
    DataConfig,
    DiffusersAutoencoder,
    FolderSource,
    Loader,
    LoaderConfig,
    PixelAutoencoder,
    TarImages,
    Tokenizer,
    image_source,
)
from transfusion.data.drafting import Mixture
from transfusion.data.latent_cache import LatentCache, encode_images
from transfusion.data.listing import DrawnImages, JoinedImages, each_image
from transfusion.data.sources import CaptionedImage
from transfusion.evaluation import evenly, image_figures, read_images
from transfusion.evaluation.metrics import Samples
from transfusion.generation import TransfusionPipeline
from transfusion.generation.inputs import Row
from transfusion.run import Run
from transfusion.sequence import Image, Text, document_length

WORDS = ["make", "it", "darker", "brighter", "red", "blue", "please"]
TOKENIZER = Tokenizer.train([" ".join(WORDS)] * 3, 300)
CONFIG = LoaderConfig(rows=4, row_length=48, image_size=8, patch_size=4, text_fraction=0.0, seed=3)  # 4 tokens an image


def _level(latent: torch.Tensor) -> int:
    return round(float(latent[0].mean() + 1) * 127.5)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def write(edits: int, captioned: int = 0, size: tuple[int, int] = (12, 12)) -> Path:
        """Edit k changes level k into 100 + k; captioned images have levels from 200 on."""
        lines = []
        for k in range(edits):
            for name, level in ((f"from {k}.png", k), (f"to {k}.png", 100 + k)):
                Pictures.new("RGB", size, (level, 0, 0)).save(tmp_path / name)
            caption = " ".join(random.choices(WORDS, k=random.randint(1, 5)))
            lines.append({"source_image": f"from {k}.png", "caption": caption, "image": f"./to {k}.png"})
        for k in range(captioned):
            Pictures.new("RGB", size, (200 + k, 0, 0)).save(tmp_path / f"{k}.png")
            lines.append({"image": f"{k}.png", "caption": "red"})
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, random.sample(lines, len(lines)))))
        return tmp_path

    return write


def _documents(loader: Loader, rows: int) -> list[tuple[Text | Image, ...]]:
    return [document for row in loader._rows(range(rows)) for document in row]


def test_a_folder_tells_edits_from_captioned_images(folder):
    source = FolderSource(folder(edits=5, captioned=3), "all")
    assert len(source) == 8 and len(source.edits) == 5
    for index, sample in enumerate(each_image(source)):
        levels = [picture.image.getpixel((0, 0))[0] for picture in sample.pictures]
        assert (index in source.edits) == (sample.before is not None) == (len(levels) == 2)
        assert levels[0] + 100 == levels[1] if index in source.edits else levels[0] >= 200


def test_all_edits_of_a_picture_are_in_one_split(tmp_path):
    lines = []
    for k in range(12):
        for turn in range(4):
            Pictures.new("RGB", (4, 4)).save(tmp_path / f"{k}-{turn}.png")
            lines.append({"source_image": f"{k}-0.png", "caption": "red", "image": f"{k}-{turn}.png"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train, test = (FolderSource(tmp_path, split, 0.4) for split in ("train", "test"))
    first = [{name.split("-")[0] for name in source.names} for source in (train, test)]
    assert all(first) and first[0].isdisjoint(first[1])


def test_what_edits_join_is_in_one_split(tmp_path):
    """Chains, and pictures that are described as well; what is in no edit stays where it was."""
    lines = [{"image": f"{k}.png", "caption": "red"} for k in range(40)]
    lines += [{"source_image": f"{k}.png", "caption": "red", "image": f"{k + 1}.png"} for k in range(20) if k % 4 < 2]
    for k in range(40):
        Pictures.new("RGB", (4, 4)).save(tmp_path / f"{k}.png")

    def split(entries: list[dict[str, str]]) -> list[set[str]]:
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, random.sample(entries, len(entries)))))
        sources = [FolderSource(tmp_path, side, 0.4) for side in ("train", "test")]
        return [{picture.name for sample in each_image(source) for picture in sample.pictures} for source in sources]

    alone, (train, test) = split(lines[:40]), split(lines)
    assert train and test and train.isdisjoint(test) and len(train | test) == 40
    free = {str(tmp_path / f"{k}.png") for k in range(20, 40)}
    assert [side & free for side in (train, test)] == [side & free for side in alone]


@pytest.mark.parametrize("before", [7, "", "gone.png", "captions.jsonl", ["a.png"]])
def test_an_edit_of_nothing_is_skipped_and_named(folder, before):
    path = folder(edits=1, captioned=1)
    line = {"source_image": before, "caption": "red", "image": "0.png"}
    (path / "captions.jsonl").write_text((path / "captions.jsonl").read_text() + "\n" + json.dumps(line))
    source = FolderSource(path, "all")
    assert len(source) == 2
    ((name, reason),) = source.skipped
    assert str(before) in name if str(before).endswith("g") or str(before).endswith("l") else repr(before) in reason


def test_the_document_of_an_edit(folder):
    """BOS [before] caption [image] EOS, the first noised to the limit at most; of dropped captions BOS [image]."""
    source = FolderSource(folder(edits=9, captioned=4), "all")
    config = replace(CONFIG, caption_first=0.0, caption_dropout=0.3, max_time_image_first=0.25)
    loader = Loader(config, TOKENIZER, source)
    captions = {source[index].name: source.captions[index] for index in range(len(source))}
    kinds = set()
    for document in _documents(loader, 60):
        images = [segment for segment in document if isinstance(segment, Image)]
        levels, times = [_level(image.latent) for image in images], [image.max_time for image in images]
        texts = [segment.token_ids.tolist() for segment in document if isinstance(segment, Text)]
        if len(images) == 2:
            caption = captions[str(source.path / f"to {levels[0]}.png")]
            assert levels[1] == levels[0] + 100 and times == [0.25, 1.0]
            assert texts == [[1], TOKENIZER.encode(caption).tolist(), [2]]
            assert [type(segment) for segment in document] == [Text, Image, Text, Image, Text]
        elif levels[0] >= 200 and texts != [[1]]:
            assert times == [0.25] and texts == [[1], [*TOKENIZER.encode("red").tolist(), 2]]
        else:
            assert times == [1.0] and texts == [[1]] and levels[0] >= 100
        kinds.add((len(images), levels[0] >= 200, len(texts)))
    assert kinds == {(2, False, 3), (1, True, 2), (1, True, 1), (1, False, 1)}


def test_rows_know_how_long_an_edit_is(folder):
    source = FolderSource(folder(edits=9, captioned=3), "all")
    loader = Loader(replace(CONFIG, caption_dropout=0.0), TOKENIZER, source)
    for number in range(12):
        deck, places = loader._images[0].row(number)
        (documents,) = loader._rows(range(number, number + 1))
        assert [deck[place].length for place in places] == [document_length(d, CONFIG.patch_size) for d in documents]


def test_a_caption_that_fits_beside_one_image_may_not_fit_beside_two(folder):
    path = folder(edits=1, captioned=1)
    room = Loader(CONFIG, TOKENIZER, FolderSource(path, "all")).max_caption_tokens
    entries = [json.loads(line) for line in (path / "captions.jsonl").read_text().splitlines()]
    for length, kept in ((room - 6, 2), (room - 5, 1)):
        for entry in entries:
            entry["caption"] = "Z" * length  # one token a letter
        (path / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
        loader = Loader(CONFIG, TOKENIZER, FolderSource(path, "all"))
        assert len(loader._images[0].row(0)[0]) == kept and len(loader.skipped) == 2 - kept
    with pytest.raises(ValueError, match="holds no two images of 4 tokens"):
        Loader(replace(CONFIG, row_length=13), TOKENIZER, FolderSource(folder(edits=2), "all"))


@pytest.mark.parametrize("name", ["from 1.png", "to 1.png"])
def test_an_edit_with_a_corrupt_picture_is_replaced_and_named(folder, name):
    path = folder(edits=4)
    noise = Pictures.effect_noise((64, 64), 90).convert("RGB")
    noise.save(path / name)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    loader = Loader(replace(CONFIG, caption_dropout=0.0), TOKENIZER, FolderSource(path, "all"))
    documents = _documents(loader, 8)
    levels = {tuple(_level(s.latent) for s in document if isinstance(s, Image)) for document in documents}
    assert levels <= {(0, 100), (2, 102), (3, 103)} and len(documents) > 8
    assert [skipped for skipped, _ in loader.skipped] == [str(path / name)]


def test_a_corrupt_picture_before_takes_no_other_sample_along(folder):
    path = folder(edits=0, captioned=3)
    (path / "broken.png").write_bytes((path / "0.png").read_bytes()[:50])
    line = {"source_image": "broken.png", "caption": "red", "image": "0.png"}
    (path / "captions.jsonl").write_text((path / "captions.jsonl").read_text() + "\n" + json.dumps(line))
    loader = Loader(CONFIG, TOKENIZER, FolderSource(path, "all"))
    counts = Counter(_level(s.latent) for document in _documents(loader, 30) for s in document if isinstance(s, Image))
    assert set(counts) == {200, 201, 202} and min(counts.values()) >= 20
    assert [name for name, _ in loader.skipped] == [str(path / "broken.png")]


@pytest.mark.parametrize("before", [None, "from 0.png"])
def test_a_resume_tells_of_edits_that_changed(folder, caplog, before):
    path = folder(edits=5)
    entries = [json.loads(line) for line in (path / "captions.jsonl").read_text().splitlines()]

    def loader(lines: list[dict[str, str | None]]) -> Loader:
        (path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return Loader(CONFIG, TOKENIZER, FolderSource(path, "all"))

    changed = [entry | {"source_image": before} for entry in entries]
    state = loader(changed).state_dict()
    loader(changed).load_state_dict(state)
    assert not caplog.records
    loader(entries).load_state_dict(state)
    assert ["5 of them, not the same ones" in record.getMessage() for record in caplog.records] == [True]


def test_both_pictures_of_an_edit_have_one_size(folder):
    """That of the image that is asked for, whatever the other's."""
    path = folder(edits=6, size=(20, 10))
    for k in range(6):
        Pictures.new("RGB", (10, 20), (k, 0, 0)).save(path / f"from {k}.png")
    config = replace(CONFIG, aspect_ratios=("1:2", "1:1", "2:1"), caption_dropout=0.0)
    source = FolderSource(path, "all")
    for document in _documents(Loader(config, TOKENIZER, source), 6):
        assert {tuple(s.latent.shape[1:]) for s in document if isinstance(s, Image)} == {(4, 12)}
    samples, _ = read_images(
        source, TOKENIZER, PixelAutoencoder(), [(12, 4), (8, 8), (4, 12)], lambda _: 20
    )  # evaluated so too
    assert {tuple(each.shape) for each in (*samples.latents, *samples.before)} == {(3, 4, 12)}


def test_so_many_images_a_row_are_no_edits(folder):
    with pytest.raises(ValueError, match=r"images_per_row=2 .* an edit takes two"):
        Loader(replace(CONFIG, images_per_row=2), TOKENIZER, FolderSource(folder(edits=3), "all"))


def test_tar_shards_hold_edits(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for k in range(6):
            for suffix, level in (("source.png", k), ("png", 100 + k))[:: random.choice((1, -1))]:
                file = io.BytesIO()
                Pictures.new("RGB", (9, 9), (level, 0, 0)).save(file, "PNG")
                add(f"{k}.{suffix}", file.getvalue())
            add(f"{k}.txt", b"make it red")
    loader = Loader(replace(CONFIG, caption_dropout=0.0), TOKENIZER, TarImages([tmp_path / "0.tar"], "all"))
    documents = _documents(loader, 4)
    levels = [tuple(_level(s.latent) for s in document if isinstance(s, Image)) for document in documents]
    assert len(levels) > 4 and all(last == first + 100 for first, last in levels)


def test_a_mixture_is_listed_with_its_edits(folder, tmp_path):
    edits = FolderSource(folder(edits=4), "all")
    alone = [CaptionedImage("red", Pictures.new("RGB", (9, 9)), str(k)) for k in range(3)]
    joined = JoinedImages([DrawnImages(alone, []), edits, DrawnImages([edits[0], alone[0]], [])])
    assert set(joined.edits) == {3, 4, 5, 6, 7} and joined.edits[3] == edits.edits[0]
    assert all((joined[k].before is not None) == (k in joined.edits) for k in range(len(joined)))
    loader = Loader(CONFIG, TOKENIZER, Mixture((DrawnImages(alone, []), edits), (1.0, 1.0)))
    assert loader.batch(0).num_images > 0


def test_a_latent_cache_holds_both_pictures(folder, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    kind, wide = ("DownEncoderBlock2D",) * 2, (8, 8)
    vae = diffusers.AutoencoderKL(
        down_block_types=kind, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=wide, norm_num_groups=4
    )
    vae.save_pretrained(tmp_path / "vae")
    autoencoder = DiffusersAutoencoder(tmp_path / "vae")
    source = FolderSource(folder(edits=3, captioned=1), "all")
    cache = LatentCache(tmp_path / "cache", autoencoder.fingerprint, repair=True)
    assert encode_images(each_image(source), [(8, 8)], autoencoder, cache, shard_entries=2) == (7, [])
    assert encode_images(each_image(source), [(8, 8)], autoencoder, cache) == (0, [])
    config = replace(CONFIG, patch_size=2)
    fresh, cached = (Loader(config, TOKENIZER, source, autoencoder=autoencoder, cache=c) for c in (None, cache))
    expected = fresh.batch(0).latents
    monkeypatch.setattr(autoencoder, "moments", None)
    assert torch.equal(cached.batch(0).latents, expected)


def test_what_is_trained_is_what_is_asked_for(folder):
    """The pipeline's document of an edit is the loader's, token by token, up to the image that it draws."""
    source = FolderSource(folder(edits=1), "all")
    (document, *_) = _documents(Loader(replace(CONFIG, caption_dropout=0.0), TOKENIZER, source), 1)
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, dim=32, layers=1, heads=2, latent_channels=3, patch_size=4)
    pipe = TransfusionPipeline(Transfusion(config), TOKENIZER, PixelAutoencoder(), (3, 8, 8))
    row = Row(source.captions[0], source[0].before.image, None, "image")
    asked = pipe._request(row, 8, 1, pipe.latent_shape).context
    for mine, its in zip(asked, document, strict=False):
        assert type(mine) is type(its) and torch.equal(mine[0], its[0])
    assert [type(segment) for segment in document[len(asked) :]] == [Image, Text]


def test_figures_are_of_the_image_that_is_asked_for(folder):
    """The image before stands in the context, at time 0, and is not judged; shuffled instructions are told apart."""
    path = folder(edits=6, captioned=4)
    source = FolderSource(path, "all")
    samples, skipped = read_images(source, TOKENIZER, PixelAutoencoder(), [(8, 8)], lambda _: 20)
    assert skipped == 0 and [first is not None for first in samples.before] == [k in source.edits for k in range(10)]
    torch.manual_seed(0)
    model = Transfusion(
        ModelConfig(vocab_size=TOKENIZER.vocab_size, dim=32, layers=2, heads=2, latent_channels=3, patch_size=4)
    ).eval()
    figures = image_figures(model, samples, draws=2, seed=0)
    assert figures["images"] == 10
    # the network sees the image before: another one there gives another loss, of the same images and noise
    others = [None if first is None else torch.randn_like(first) for first in samples.before]
    changed = image_figures(model, samples._replace(before=others), draws=2, seed=0)
    assert changed["loss"] != figures["loss"]
    assert changed["loss_predicting_zero"] == pytest.approx(figures["loss_predicting_zero"])
    # and of captioned images the figures do not know that there are edits
    plain = [k for k in range(10) if k not in source.edits]
    alone = Samples([samples.captions[k] for k in plain], [samples.latents[k] for k in plain], [None] * len(plain))
    assert image_figures(model, alone, draws=1, seed=0)["images"] == 4


def test_a_run_of_edits_trains_evaluates_and_previews(folder, tmp_path, monkeypatch):
    data, out = folder(edits=24, captioned=4), tmp_path / "run"
    options = ["--model.dim", "32", "--model.layers", "1", "--model.heads", "2", "--model.vocab-size", "300"]
    options += ["--data.texts", "none", "--data.loader.rows", "2", "--data.loader.row-length", "64"]
    options += ["--data.loader.image-size", "16", "--data.loader.patch-size", "8", "--model.patch-size", "8"]
    options += ["--train.steps", "2", "--train.preview-every", "1", "--train.warmup-steps", "1", "--device", "cpu"]
    assert cli.main(["train", "--out", str(out), "--data.images", str(data), *options]) == 0
    run = Run.open(out)
    figures = run.evaluate(run.model(), draws=1)
    assert figures["images_train"]["images"] > 20 and figures["images_train"]["skipped"] == 0
    asked = []
    draw = TransfusionPipeline.images
    monkeypatch.setattr(
        TransfusionPipeline, "images", lambda *a, **o: asked.append((a[1], o["image"])) or draw(*a, **o)
    )
    preview = run._preview(20)(run.model())
    train = image_source(DataConfig(images=str(data)), "train")
    shown = [train[index] for index in evenly(len(train), 16)]
    cells = [picture for sample in shown for picture in sample.pictures]
    assert preview.shape == (-(-len(cells) // 8) * 16, 8 * 16, 3)
    ((captions, before),) = asked
    assert captions == [sample.caption for sample in shown] and any(sample.before for sample in shown)
    for sample, given in zip(shown, before, strict=True):
        assert (given is None) == (sample.before is None)
        assert given is None or round(float(given[0].mean()) * 255) == sample.before.image.getpixel((0, 0))[0]
    for place, picture in enumerate(cells):
        top, left = 16 * (place // 8), 16 * (place % 8)
        corner = preview[top, left]
        level = picture.image.getpixel((0, 0))[0]
        assert any(picture is each for each in shown) or corner.tolist() == [level, 0, 0]
    edit = next(sample for sample in shown if sample.before)
    for letters, fits in ((50, True), (52, False)):  # a token each, beside two images
        source = DrawnImages([replace(edit, caption="Z" * letters)], [])
        samples = run._readable(source, [0], run._longest)
        assert len(samples) == len(run._drawn(run.model(), samples, steps=1)) == fits
    entries = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    longer = [entry | {"caption": "Z" * 52} if "source_image" in entry else entry for entry in entries]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, longer)))
    figures = run.evaluate(run.model(), draws=1)["images_train"]
    assert figures["images"] + figures["skipped"] == len(train) and figures["skipped"] == len(train.edits)
