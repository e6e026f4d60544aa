"""Hugging Face datasets written on disk here; nothing is downloaded."""

import importlib.util
import io
from itertools import islice

import pytest
from PIL import Image

from transfusion.data.hub import HubImages, HubImageStream, HubTexts, HubTextStream
from transfusion.data.listing import in_order
from transfusion.data.loader import Loader, LoaderConfig
from transfusion.data.sources import SampleError
from transfusion.data.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the hub extra")

COUNT = 24


def _png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One dataset, as `save_to_disk` writes it, and as a folder of parquet files."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hub")
    rows = {
        "picture": [{"bytes": _png(level), "path": None} for level in range(COUNT)],
        "caption": [f"caption {level}" for level in range(COUNT)],
        "several": [[f"first {level}", "second"] for level in range(COUNT)],
    }
    rows["picture"][5] = {"bytes": b"no picture", "path": None}
    rows["caption"][7] = " "
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "caption": datasets.Value("string"),
            "several": datasets.List(datasets.Value("string")),
        }
    )
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(folder / "arrow")
    (folder / "parquet").mkdir()
    for shard in range(3):
        data.shard(3, shard).to_parquet(folder / "parquet" / f"train-{shard}.parquet")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_images_and_captions_of_a_dataset(saved, kind):
    source = HubImages(str(saved / kind), "all")
    assert len(source) == COUNT - 1 and source.captions[3] == "caption 3"
    assert source.skipped == [(f"{saved / kind}[7]", "column 'caption' holds no caption")]
    assert source[10].image.getpixel((0, 0)) == (11, 0, 0)
    with pytest.raises(SampleError, match=r"\[5\]: unreadable image"):
        source[5].image  # noqa: B018
    train, test = HubImages(str(saved / kind), "train", 0.3), HubImages(str(saved / kind), "test", 0.3)
    assert sorted(train.names + test.names) == sorted(source.names) and test.names


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_streamed_dataset_goes_on_from_every_cursor(saved, kind):
    stream = HubImageStream(str(saved / kind), "all")
    captions = [sample.caption for sample in in_order(stream)]
    assert sorted(captions) == sorted(f"caption {level}" for level in range(COUNT) if level != 7)
    assert len(stream.skipped) == 1
    for shard in range(stream.num_shards):
        whole = list(stream.read(shard))
        for index in range(0, len(whole), 3):
            rest = [sample.caption for _, sample in stream.read(shard, whole[index][0])]
            assert rest == [sample.caption for _, sample in whole[index + 1 :]]


def test_columns_can_be_named_and_a_first_caption_taken(saved):
    source = HubImages(f"{saved / 'arrow'}?image=picture&caption=several", "all")
    assert source.captions[2] == "first 2"
    for query, message in {
        "caption=title": "no column 'title'; the columns are picture, caption, several",
        "colour=red": "unknown option 'colour'",
    }.items():
        with pytest.raises(ValueError, match=message):
            HubImages(f"{saved / 'arrow'}?{query}")


@pytest.mark.parametrize("streamed", [False, True])
def test_edits_of_a_dataset(tmp_path, streamed):
    """A second picture in a row, named; the first column of images is another one then."""
    import datasets

    pictures = {
        name: [{"bytes": _png(first + level), "path": None} for level in range(8)]
        for name, first in (("original", 0), ("edited", 100))
    }
    pictures["original"][3] = None
    features = {name: datasets.Image() for name in pictures} | {"edit_prompt": datasets.Value("string")}
    rows = pictures | {"edit_prompt": [f"make it {level}" for level in range(8)]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "edits")
    spec = f"{tmp_path / 'edits'}?source_image=original&caption=edit_prompt"
    if streamed:
        stream = HubImageStream(spec, "all")
        samples = list(in_order(stream))
        assert [reason for _, reason in stream.skipped] == ["column 'original' holds no image"]
    else:
        source = HubImages(spec, "all")
        assert source.edits == dict.fromkeys(range(8), "original")
        samples = [source[index] for index in range(8) if index != 3]
        with pytest.raises(SampleError, match="column 'original' holds no image"):
            source[3]
    levels = [[picture.image.getpixel((0, 0))[0] for picture in sample.pictures] for sample in samples]
    assert levels == [[k, 100 + k] for k in range(8) if k != 3]
    assert [sample.caption for sample in samples] == [f"make it {k}" for k in range(8) if k != 3]
    for kind, message in {"source_image=before&caption=edit_prompt": "no column 'before'"}.items():
        with pytest.raises(ValueError, match=message):
            HubImages(f"{tmp_path / 'edits'}?{kind}")
    with pytest.raises(ValueError, match="source_image is of images"):
        HubTexts(f"{tmp_path / 'edits'}?source_image=original&text=edit_prompt", "all")


def test_texts(saved, tmp_path):
    texts = HubTexts(f"{saved / 'arrow'}?text=caption", "all")
    assert len(texts) == COUNT - 1 and [reason for _, reason in texts.skipped] == ["blank"]
    assert sorted(in_order(HubTextStream(f"{saved / 'arrow'}?text=caption", "all"))) == sorted(texts)
    import datasets

    datasets.Dataset.from_dict({"number": [1, 2]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ValueError, match="no text column found in number"):
        HubTexts(str(tmp_path / "numbers"))


def test_a_loader_reads_both_kinds(saved):
    tokenizer = Tokenizer.train(["caption 0123456789"] * 3, 300)
    config = LoaderConfig(rows=4, row_length=60, image_size=8, patch_size=4, text_fraction=0.0, shuffle_block=8)
    for source in (HubImages(str(saved / "arrow"), "all"), HubImageStream(str(saved / "parquet"), "all")):
        loader = Loader(config, tokenizer, source)
        levels = {
            round(level)
            for batch in islice(loader.iterate(), 8)
            for level in ((batch.latents[:, 0, 0, 0] + 1) * 127.5).tolist()
        }
        assert levels == set(range(COUNT)) - {5, 7}
        reasons = sorted(reason for _, reason in loader.skipped)
        assert reasons[0] == "column 'caption' holds no caption" and reasons[1].startswith("unreadable image")
        assert len(reasons) == 2
