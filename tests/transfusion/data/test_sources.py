import json
import logging
import random

import numpy as np
import pytest
from PIL import Image

from transfusion.data.sources import FolderSource, SampleError, held_out, open_rgb
from transfusion.data.streams import JsonlTexts
from transfusion.data.texts import PydocTextSource, TextFolderSource


@pytest.fixture
def write_folder(tmp_path):
    """Writes `count` images with captions, then the given extra lines; returns the folder."""

    def write(count: int, *lines: str):
        rng = np.random.default_rng()
        entries = []
        for index in range(count):
            name = f"images/{index}.png"
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / name)
            entries.append(json.dumps({"image": name, "caption": f"caption {index}"}))
        (tmp_path / "captions.jsonl").write_text("\n".join([*entries, *lines]), encoding="utf-8")
        return tmp_path

    return write


def test_folder_gives_captions_and_pixels(write_folder):
    folder = write_folder(3)
    source = FolderSource(folder, "all")
    assert len(source) == 3 and source.skipped == []
    for index in range(3):
        item = source[index]
        assert (item.caption, item.name) == (f"caption {index}", f"{folder}/images/{index}.png")
        assert np.array_equal(np.asarray(item.image), np.asarray(Image.open(item.name)))


def test_a_file_has_one_name(write_folder):
    others = [json.dumps({"image": name, "caption": "again"}) for name in ("./images/0.png", "x/../images/1.png")]
    folder = write_folder(2, *others)
    assert FolderSource(folder, "all").names == [f"images/{index}.png" for index in (0, 1, 0, 1)]


def test_deep_pixels_that_are_transparent_are_white(tmp_path):
    levels = np.array([[0, 257, 40_000, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png", transparency=257)
    assert [pixel[0] for pixel in open_rgb(tmp_path / "deep.png", "deep").get_flattened_data()] == [0, 255, 155, 255]


def test_folder_split_is_a_stable_partition(write_folder):
    folder = write_folder(40)
    train, test = FolderSource(folder, "train", 0.2), FolderSource(folder, "test", 0.2)
    assert sorted(train.names + test.names) == sorted(FolderSource(folder, "all").names)
    assert test.names and train.names == FolderSource(folder, "train", 0.2).names
    lines = (folder / "captions.jsonl").read_text().splitlines()
    (folder / "captions.jsonl").write_text("\n".join(lines[:-1]))
    assert set(FolderSource(folder, "test", 0.2).names) <= set(test.names)  # the others stay where they are


def test_all_captions_of_one_image_are_in_one_split(write_folder):
    lines = [json.dumps({"image": f"images/{i}.png", "caption": f"another {i}"}) for i in range(30)]
    folder = write_folder(30, *lines)
    train, test = FolderSource(folder, "train", 0.3), FolderSource(folder, "test", 0.3)
    assert len(train) + len(test) == 60 and set(train.names).isdisjoint(test.names)


def test_small_sets_have_a_test_split_too():
    for count in range(2, 12):
        assert len(held_out([f"name {i}" for i in range(count)], 0.001)) == 1
    assert held_out(["only"], 0.001) == set() == held_out(["only"], 0.999) == held_out(["a", "b"], 0.0)
    assert len(held_out(["a", "b"], 0.999)) == 1  # what trains is never empty
    many = [str(i) for i in range(4000)]
    assert abs(len(held_out(many, 0.1)) / 4000 - 0.1) < 0.02


def test_folder_skips_counts_and_names_what_is_broken(write_folder, tmp_path, caplog):
    folder = write_folder(
        2,
        '{"image": "images/0.png", "caption": ',
        '["images/0.png", "a list"]',
        '{"image": "images/0.png", "caption": "  "}',
        '{"image": "images/missing.png", "caption": "gone"}',
        '{"image": "text.png", "caption": "no image"}',
        "",
    )
    (tmp_path / "text.png").write_text("this is text")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder, "all")
    assert len(source) == 2
    named = ["captions.jsonl:3", "captions.jsonl:4", "captions.jsonl:5", "images/missing.png", "text.png"]
    assert [name for name, _ in source.skipped] == [f"{folder}/{name}" for name in named]
    assert "malformed JSON" in source.skipped[0][1] and "does not exist" in source.skipped[3][1]
    for name, reason in source.skipped:
        assert f"{name}: {reason}" in caplog.text


def test_a_bad_line_is_warned_about_once_however_often_its_file_is_read(write_folder, caplog):
    folder = write_folder(8, "no JSON")
    (folder / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nno JSON either')
    for split in ("train", "test"):
        images, texts = FolderSource(folder, split, 0.3), TextFolderSource(folder, split, 0.5)
        assert len(images.skipped) == len(texts.skipped) == 1
    assert [message.partition(": ")[0] for message in caplog.messages] == [
        f"skipped {folder}/captions.jsonl:9",
        "skipped texts.jsonl:3",
    ]


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_image_truncated_after_its_header_raises_a_sample_error_at_access(tmp_path, format_):
    pixels = np.random.default_rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"broken.{format_.lower()}"
    Image.fromarray(pixels).save(file, format=format_)
    whole = file.read_bytes()
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": file.name, "caption": "half"}))
    FolderSource(tmp_path, "all")[0]
    file.write_bytes(whole[: len(whole) * 3 // 5])
    source = FolderSource(tmp_path, "all")
    with pytest.raises(SampleError, match=file.name):
        source[0].image  # noqa: B018


def test_transparent_and_grey_images_become_rgb_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    entries = [{"image": name, "caption": name} for name in ("clear.png", "grey.png")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    clear, grey = (FolderSource(tmp_path, "all")[i].image for i in range(2))
    assert clear.getpixel((0, 0)) == (255, 255, 255) and grey.getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("captions", [None, "", '{"image": "none.png", "caption": "x"}'])
def test_folder_without_a_valid_image_says_what_is_expected(tmp_path, captions):
    if captions is not None:
        (tmp_path / "captions.jsonl").write_text(captions)
    with pytest.raises(ValueError, match=r'captions\.jsonl.*"image": "relative/path\.jpg"'):
        FolderSource(tmp_path)


def test_empty_split_and_unknown_split_are_errors(write_folder):
    folder = write_folder(1)
    with pytest.raises(ValueError, match=r"test split .* is empty"):
        FolderSource(folder, "test")
    with pytest.raises(ValueError, match="'dev'"):
        FolderSource(folder, "dev")
    with pytest.raises(ValueError, match=r"1\.5"):
        FolderSource(folder, "train", 1.5)


def test_text_folder_reads_recursively_and_names_what_it_skips(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.TXT").write_text("first ü", encoding="utf-8")
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "ignored.md").write_text("not text")
    source = TextFolderSource(tmp_path, "all")
    assert dict(zip(source.names, source, strict=True)) == {"b.txt": "second", "deep/er/a.TXT": "first ü"}
    assert {name for name, _ in source.skipped} == {"blank.txt", "binary.txt"}
    train, test = TextFolderSource(tmp_path, "train"), TextFolderSource(tmp_path, "test")
    assert len(train) == len(test) == 1 and train.names != test.names


def test_lines_of_text_stay_in_their_split_when_others_come(tmp_path):
    """Held out by what they say, so also wherever they are moved to; one that is there twice is on one side."""
    words = [f"text {random.random()}" for _ in range(60)]
    lines = [json.dumps({"text": text}) for text in words]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    before = {split: set(TextFolderSource(tmp_path, split, 0.3)) for split in ("train", "test")}
    assert set().union(*before.values()) == set(words) and not before["train"] & before["test"]
    random.shuffle(lines)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps({"text": "new"}), *lines, *lines]))
    after = {split: set(TextFolderSource(tmp_path, split, 0.3)) - {"new"} for split in ("train", "test")}
    assert after == before
    streamed = {split: set(dict(JsonlTexts([tmp_path / "b.jsonl"], split, 0.3).read(0)).values()) for split in before}
    assert not streamed["train"] & streamed["test"] and set().union(*streamed.values()) == {"new", *words}


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("second")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "a.txt").write_text("first")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "a" / "up").symlink_to(tmp_path / "texts")  # round and round
    source = TextFolderSource(tmp_path / "texts", "all")
    assert dict(zip(source.names, source, strict=True)) == {"a/a.txt": "first", "linked/b.txt": "second"}


def test_an_image_is_in_one_split_however_its_path_is_written(write_folder, monkeypatch):
    folder = write_folder(20)
    file = folder / "captions.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    absolute = [{**entry, "image": str(folder / entry["image"])} for entry in entries]
    dotted = [{**entry, "image": f"./{entry['image']}"} for entry in entries]
    file.write_text("\n".join(json.dumps(entry) for entry in (*entries, *absolute, *dotted)))
    train, test = FolderSource(folder, "train", 0.3), FolderSource(folder, "test", 0.3)
    assert set(train.names).isdisjoint(test.names) and len(train) + len(test) == 60
    assert set(train.names) | set(test.names) == {entry["image"] for entry in entries}
    monkeypatch.chdir(folder.parent)
    assert FolderSource(folder.name, "test", 0.3).names == test.names


def test_text_folder_without_text_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"UTF-8 \*\.txt"):
        TextFolderSource(tmp_path)


def test_pydoc_splits_share_no_topic_and_no_paragraph():
    train, test = PydocTextSource("train"), PydocTextSource("test")
    assert set(train.names).isdisjoint(test.names)
    assert sum(map(len, train)) > 200_000 and sum(map(len, test)) > 5_000

    def paragraphs(source):
        joined = (" ".join(p.split()) for text in source for p in text.split("\n\n"))
        return {p for p in joined if len(p) >= 40}

    assert paragraphs(train).isdisjoint(paragraphs(test))
