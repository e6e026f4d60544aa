import io
import json
import logging
import random
import tarfile
from collections import Counter

import pytest
from PIL import Image

from transfusion.data.sources import SampleError
from transfusion.data.streams import JsonlTexts, TarImages, belongs, shard_paths


def png(level: int, size=(9, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples) -> None:
    """samples: {key: {suffix: bytes}}"""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 1 and 8 samples; image levels count on."""
    level = 0
    for shard, count in enumerate((5, 1, 8)):
        samples = {}
        for index in range(count):
            text = {"txt": f"caption {level}".encode()}
            as_json = {"json": json.dumps({"caption": f"caption {level}", "url": "x"}).encode()}
            samples[f"part/{index:04d}"] = {"png": png(level), **(text if level % 2 else as_json)}
            level += 1
        write_tar(tmp_path / f"{shard:03d}.tar", samples)
    return tmp_path


def test_tar_shards_give_captions_and_pixels(shards):
    stream = TarImages(shard_paths(f"{shards}/{{000..002}}.tar"), "all")
    assert stream.num_shards == 3 and stream.skipped == []
    samples = [sample for shard in range(3) for _, sample in stream.read(shard)]
    assert [sample.caption for sample in samples] == [f"caption {level}" for level in range(14)]
    assert [sample.image.getpixel((0, 0)) for sample in samples] == [(level, 0, 0) for level in range(14)]
    assert samples[5].name == f"{shards}/001.tar/part/0000" and samples[0].size == (9, 8)


def test_every_cursor_of_a_shard_goes_on_with_the_next_sample(shards):
    stream = TarImages(shard_paths(f"{shards}/*.tar"), "all")
    whole = list(stream.read(2))
    for index, (cursor, _) in enumerate(whole):
        assert [s.name for _, s in stream.read(2, cursor)] == [s.name for _, s in whole[index + 1 :]]


def test_splits_partition_the_stream(shards):
    paths = shard_paths(f"{shards}/*.tar")
    train, test = (
        [s.name for k in range(3) for _, s in TarImages(paths, split, 0.3).read(k)] for split in ("train", "test")
    )
    assert len(train) + len(test) == 14 and set(train).isdisjoint(test)
    held = sum(belongs(f"name {i}", "test", 0.2) for i in range(4000))
    assert abs(held / 4000 - 0.2) < 0.03
    with pytest.raises(ValueError, match="'dev'"):
        belongs("x", "dev", 0.1)


@pytest.mark.parametrize("cut", ["in a header", "in an image", "garbage"])
def test_a_damaged_shard_gives_what_is_whole_and_is_named(shards, cut, caplog):
    path = shards / "002.tar"
    cursors = [cursor for cursor, _ in TarImages([path], "all").read(0)]
    content = path.read_bytes()
    end = cursors[2] + {"in a header": 100, "in an image": 540, "garbage": 0}[cut]
    path.write_bytes(content[:end] + (b"x" * 3000 if cut == "garbage" else b""))
    stream = TarImages([path], "all")
    with caplog.at_level(logging.WARNING):
        names = [sample.name for _, sample in stream.read(0)]
        list(stream.read(0))
    assert names in ([f"{path}/part/{i:04d}" for i in range(count)] for count in (2, 3))
    assert [name for name, _ in stream.skipped] == [str(path)]
    assert caplog.text.count("the shard is damaged") == 1


def test_incomplete_samples_are_skipped_counted_and_named(tmp_path):
    good = {"png": png(1), "txt": b"good"}
    samples = {
        "a": {"txt": b"no image"},
        "b": {"png": png(2)},
        "c": {"png": png(3), "json": b"{"},
        "d": {"png": png(4), "txt": b"\xff\xfe"},
        "deep": {"png": png(5), "json": b"[" * 200_000},
        "e": {"png": b"no png", "txt": b"broken pixels"},
        "f": good,
    }
    write_tar(tmp_path / "x.tar", samples)
    stream = TarImages([tmp_path / "x.tar"], "all")
    read = [sample for _, sample in stream.read(0)]
    assert [sample.name for sample in read] == [f"{tmp_path}/x.tar/{key}" for key in "ef"]
    assert [name for name, _ in stream.skipped] == [f"{tmp_path}/x.tar/{key}" for key in (*"abcd", "deep")]
    with pytest.raises(SampleError, match=r"x\.tar/e: unreadable image"):
        read[0].image  # noqa: B018


def test_what_macos_puts_beside_every_file_is_of_no_sample(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in "ab":
            for name, content in ((f"{key}.png", png(1)), ("README", b"?"), (f"{key}.txt", key.encode())):
                for member in (f"./._{name}", name):
                    header = tarfile.TarInfo(member)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    stream = TarImages([tmp_path / "x.tar"], "all")
    assert [sample.caption for _, sample in stream.read(0)] == ["a", "b"] and stream.skipped == []


def test_a_path_is_a_path_whatever_it_holds(tmp_path):
    folder = tmp_path / "a [b] {c}"
    folder.mkdir()
    (folder / "t.tar").write_bytes(b"")
    assert shard_paths(str(folder / "t.tar")) == [folder / "t.tar"]
    with pytest.raises(ValueError, match=r"the range \{3\.\.1\} of .* goes down; give \{1\.\.3\}"):
        shard_paths(str(tmp_path / "x{3..1}.tar"))


def test_shard_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-1.tar"):
        (tmp_path / name).write_bytes(b"")
    names = lambda pattern: [path.name for path in shard_paths(f"{tmp_path}/{pattern}")]  # noqa: E731
    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{a-08,b-1}.tar") == ["a-08.tar", "b-1.tar"]
    assert names("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    for missing in ("a-{08..11}.tar", "c-*.tar", "none.tar"):
        with pytest.raises(ValueError, match="no shard at"):
            names(missing)
    with pytest.raises(ValueError, match=r"x\.tar\.gz is no plain \.tar"):
        TarImages([tmp_path / "x.tar.gz"])


def test_jsonl_texts_are_read_from_any_line(tmp_path):
    texts = [f"text {i} ü " + "x" * random.randint(0, 30) for i in range(20)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[7:7] = ["{", '{"body": "x"}', "", '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stream = JsonlTexts([tmp_path / "a.jsonl"], "all")
    read = list(stream.read(0))
    assert [text for _, text in read] == texts
    assert len(stream.skipped) == 3 and all(name.startswith(f"{tmp_path}/a.jsonl@") for name, _ in stream.skipped)
    for index, (cursor, _) in enumerate(read):
        assert [text for _, text in stream.read(0, cursor)] == texts[index + 1 :]
    train, test = (Counter(t for _, t in JsonlTexts([tmp_path / "a.jsonl"], s, 0.3).read(0)) for s in ("train", "test"))
    assert train + test == Counter(texts)
