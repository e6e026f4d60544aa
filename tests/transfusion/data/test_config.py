"""What the words of a DataConfig name, and the two ends of them: batches, and lists of samples."""

import io
import json
import random
import tarfile
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from transfusion import config as configs
from transfusion.data import DataConfig, EmojiSource, LoaderConfig, PixelAutoencoder, PydocTextSource, Tokenizer
from transfusion.data.config import (
    absolute,
    all_images,
    image_source,
    make_loader,
    open_cache,
    open_images,
    open_texts,
    text_source,
)
from transfusion.data.drafting import Drafter
from transfusion.data.sources import FolderSource
from transfusion.data.streams import JsonlTexts, TarImages
from transfusion.data.texts import TextFolderSource

TOKENIZER = Tokenizer.train(["red green blue small large"] * 3, 300)
LOADER = LoaderConfig(rows=8, row_length=64, image_size=8, patch_size=4, shuffle_block=16)


@pytest.fixture
def files(tmp_path):
    """folder/ with 6 images and texts, part-0.tar and part-1.tar with 10 each, lines.jsonl."""
    folder, lines = tmp_path / "folder", []
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (9, 8), (index, 0, 0)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": "red"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    (folder / "a.txt").write_text("small red " * 9)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": f"large blue {i}"}) for i in range(7)))
    for part in range(2):
        with tarfile.open(tmp_path / f"part-{part}.tar", "w") as tar:
            for index in range(10):
                buffer = io.BytesIO()
                Image.new("RGB", (9, 8), (100 + 10 * part + index, 0, 0)).save(buffer, "PNG")
                for name, content in ((f"{index}.png", buffer.getvalue()), (f"{index}.txt", b"green")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": f"green {i}"}) for i in range(30)))
    return tmp_path


def test_each_word_names_its_source(files):
    assert isinstance(open_images(str(files / "folder"), "all", 8), FolderSource)
    shards = open_images(f"{files}/part-{{0..1}}.tar", "all", 8)
    assert isinstance(shards, TarImages) and shards.num_shards == 2
    assert isinstance(open_images("emoji:demo", "train", 8), EmojiSource)
    assert len(open_images("emoji:animals-and-food", "train", 8)) > len(open_images("emoji:demo", "train", 8))
    assert isinstance(open_texts("pydoc", "train"), PydocTextSource)
    texts = open_texts(str(files / "folder"), "all")
    assert isinstance(texts, TextFolderSource) and len(texts) == 8
    assert len(open_texts(str(files / "lines.jsonl"), "all")) == 30
    assert isinstance(open_texts(f"stream:{files}/*.jsonl", "train"), JsonlTexts)
    for wrong in ("stream:folder", "shards.tar.gz", f"stream:{files}/folder"):
        with pytest.raises(ValueError, match="cannot be streamed"):
            open_images(wrong, "train", 8)
    with pytest.raises(ValueError, match="one of demo, animals-and-food, all, got 'pets'"):
        open_images("emoji:pets", "train", 8)
    with pytest.raises(ValueError, match="no shard at"):
        open_images("nowhere/*.tar", "train", 8)


def test_a_mixture_gives_each_source_its_share_of_the_rows(files):
    images = (str(files / "folder"), f"{files}/part-*.tar")
    data = DataConfig(images, "", loader=replace(LOADER, text_fraction=0.0), image_weights=(1.0, 3.0))
    loader = make_loader(data, TOKENIZER, PixelAutoencoder())
    folder = rows = 0
    for batch in islice(loader.iterate(), 10):
        levels = ((batch.latents[:, 0, 0, 0] + 1) * 127.5).round().int()
        row = batch.image_rows.view(-1, 4)[:, 0] // LOADER.row_length
        of_folder = {int(r) for r, level in zip(row, levels, strict=True) if level < 100}
        of_shards = {int(r) for r, level in zip(row, levels, strict=True) if level >= 100}
        assert not of_folder & of_shards
        folder, rows = folder + len(of_folder), rows + len(of_folder | of_shards)
    assert rows == 80 and folder == 20


def test_lists_for_the_tokenizer_and_the_evaluation(files):
    data = DataConfig(
        (str(files / "folder"), f"{files}/part-*.tar"), (str(files / "folder"), f"stream:{files}/lines.jsonl")
    )
    train, test = image_source(data, "train"), image_source(data, "test")
    assert len(train) + len(test) == 26 and set(train.captions) == {"red", "green"}
    assert len(train) == len(list(all_images(data, "train")))
    assert len(image_source(data, "train", limit=3)) == len(FolderSource(files / "folder", "train")) + 3
    assert train[0].image.size == (9, 8)
    texts = text_source(data, "train")
    assert any(text.startswith("green") for text in texts) and any(text.startswith("large") for text in texts)
    for part in range(2):
        (files / f"part-{part}.tar").write_bytes(b"no tar")
    broken = DataConfig(f"{files}/part-*.tar", "")
    assert image_source(broken, "test") is None  # as of any stream too small to hold some out
    with pytest.raises(ValueError, match=r"no image in .*part-0\.tar: the shard is damaged"):
        image_source(broken, "train")
    assert image_source(DataConfig("", ""), "train") is None and text_source(DataConfig("", ""), "train") is None


def test_it_is_said_in_toml_and_mistakes_are_named(tmp_path):
    data = DataConfig(("a", "b"), "pydoc", "pixels", LOADER, (2.0, 1.0))
    configs.save(data, tmp_path / "data.toml")
    assert configs.load(DataConfig, tmp_path / "data.toml") == data
    for weights in ((1.0,), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="image_weights"):
            replace(data, image_weights=weights)
    with pytest.raises(ValueError, match="pixels need none"):
        open_cache(replace(data, latent_cache="x"), PixelAutoencoder())


def test_paths_become_absolute_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "pixels").mkdir()  # a folder that happens to bear the word's name
    words = ("emoji:all", "hf:a/b", "stream:hf:a/b", "pydoc", "none", "/x/y.tar")
    data = absolute(DataConfig((*words, "a"), "stream:t/{0..3}*.jsonl", "vae", LOADER, latent_cache="../c"))
    assert data.images == (*words, f"{tmp_path}/a") and data.texts == f"stream:{tmp_path}/t/{{0..3}}*.jsonl"
    assert (data.autoencoder, data.latent_cache) == (f"{tmp_path}/vae", f"{tmp_path}/../c")
    assert absolute(data) == data
    for plain in (DataConfig(), DataConfig("none", "pydoc", "stabilityai/vae")):
        assert absolute(plain) == plain


def test_aspect_ratio_buckets(tmp_path):
    """Each image keeps its shape: sizes of about one area, the closest is taken, and packing knows its tokens."""
    lines, shapes = [], [(40, 40), (64, 30), (30, 64), (80, 41), (33, 32), (20, 48)]
    for index, shape in enumerate(shapes * 4):
        Image.new("RGB", shape, (index, 0, 0)).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": "red"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    loader = replace(LOADER, image_size=16, text_fraction=0.0, caption_dropout=0.0, aspect_ratios=("1:1", "2:1", "1:2"))
    data = DataConfig(str(tmp_path), "", loader=loader)
    batch = make_loader(data, TOKENIZER, PixelAutoencoder()).batch(0)
    expected = {(16, 16): {0, 4}, (12, 24): {1, 3}, (24, 12): {2, 5}}  # (height, width): shapes
    images = batch.latents.images()
    assert len(images) == batch.num_images and len({tuple(image.shape) for image in images}) == 3
    tokens = 0
    for image in images:
        index = round(float((image[0, 0, 0] + 1) * 127.5))
        assert index % 6 in expected[tuple(image.shape[1:])]
        tokens += image.shape[1] * image.shape[2] // 16
    assert tokens == len(batch.image_rows)
    assert torch.equal(batch.token_image.bincount(), torch.tensor([i.shape[1] * i.shape[2] // 16 for i in images]))
    wrong = replace(data, loader=replace(loader, aspect_ratios=("4x3",)))
    with pytest.raises(ValueError, match="'4x3'"):
        make_loader(wrong, TOKENIZER, PixelAutoencoder())


def test_the_demo_data_fills_rows_of_4096(tmp_path):
    """The paper's row length: at least 97 % of every position, over an epoch of emoji and of Python's manual."""
    images, texts = EmojiSource(16, "train", "all"), PydocTextSource("train")
    words = [texts[index] for index in range(len(texts))]
    tokenizer = Tokenizer.train([*random.sample(words, 60), *images.captions], 800)
    drafter = Drafter(tokenizer, 4096, [(64, 64)], 8, None, 4096, random.getrandbits(30), lambda name, reason: None)
    fills = [drafter.image_rows(images, "images").plan.fill, drafter.text_rows(texts, "texts").plan.fill]
    assert min(fills) >= 0.97, fills
