"""The stream of rows is one: stopped anywhere, on any number of ranks, it goes on without losing or repeating a row."""

import io
import json
import random
import tarfile
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from transfusion.data.drafting import Mixture
from transfusion.data.loader import Loader, LoaderConfig
from transfusion.data.streams import JsonlTexts, TarImages
from transfusion.data.tokenizer import Tokenizer

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "round", "square", "flat"]
TOKENIZER = Tokenizer.train([" ".join(WORDS)] * 3, 320)
CONFIG = LoaderConfig(rows=3, row_length=48, image_size=8, patch_size=4, shuffle_block=7)  # 4 tokens an image


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four tar shards of 53 images, each of one level, and two files of texts."""
    folder, level = tmp_path_factory.mktemp("shards"), 0
    for shard, count in enumerate((20, 3, 11, 19)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (9, 8), (level, 0, 0)).save(buffer, "PNG")
                _add(tar, f"{index:03d}.png", buffer.getvalue())
                _add(tar, f"{index:03d}.txt", " ".join(random.choices(WORDS, k=random.randint(1, 6))).encode())
                level += 1
    for name, count in (("a", 9), ("b", 14)):
        texts = [{"text": " ".join(random.choices(WORDS, k=random.randint(5, 60)))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.fixture(params=["streams", "map-style", "mixture of both"])
def make(request, files):
    """make(rank, world_size, **changes) -> a loader of the same data each time."""
    tar = lambda: TarImages(sorted(files.glob("*.tar")), "all")  # noqa: E731
    texts = lambda: JsonlTexts(sorted(files.glob("*.jsonl")), "all")  # noqa: E731
    listed = list(sample for shard in range(4) for _, sample in tar().read(shard))
    words = [text for shard in range(2) for _, text in texts().read(shard)]

    class Listed(list):
        names, captions, skipped = [s.name for s in listed], [s.caption for s in listed], []

    def make(rank: int = 0, world_size: int = 1, **changes) -> Loader:
        images, text = {
            "streams": lambda: (tar(), texts()),
            "map-style": lambda: (Listed(listed), words),
            "mixture of both": lambda: (
                Mixture((tar(), Listed(listed)), (2.0, 1.0)),
                Mixture((words, texts()), (1.0, 1.0)),
            ),
        }[request.param]()
        return Loader(replace(CONFIG, **changes), TOKENIZER, images, text, None, rank, world_size)

    return make


def _rows(batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, levels of the images) of each row."""
    levels = ((batch.latents[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    row_of = (batch.image_rows.view(-1, 4)[:, 0] // CONFIG.row_length).tolist()
    tokens = batch.token_ids.tolist()
    return [(row, [lev for lev, r in zip(levels, row_of, strict=True) if r == k]) for k, row in enumerate(tokens)]


def _global_rows(make, world_size: int, steps: int, state=None, **changes):
    """Rows in global order over all ranks, and the state after `steps`, which is one for all ranks."""
    loaders = [make(rank, world_size, **changes) for rank in range(world_size)]
    for loader in loaders if state is not None else ():
        loader.load_state_dict(json.loads(json.dumps(state)))
    batches = [list(islice(loader.iterate(), steps)) for loader in loaders]
    rows = [row for step in range(steps) for rank in range(world_size) for row in _rows(batches[rank][step])]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    return rows, states[0]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 3), (3, 3)])
def test_the_rows_go_on_when_the_number_of_ranks_changes(make, before, after):
    expected, _ = _global_rows(make, 1, 5 * 12)
    first, state = _global_rows(make, before, random.randint(1, 4))
    second, state = _global_rows(make, after, 3, state)
    third, _ = _global_rows(make, 2, 2, state, rows=5)  # and when the batch size does
    whole = [*first, *second, *third]
    assert whole == expected[: len(whole)]


def test_noise_and_times_differ_between_ranks_and_steps(make):
    batches = [batch for rank in range(2) for batch in islice(make(rank, 2).iterate(), 3)]
    assert len({int(batch.noise_seed) for batch in batches}) == 6


@pytest.mark.parametrize("make", ["streams"], indirect=True)
def test_workers_do_not_change_the_batches(make):
    threads = next(make().iterate())
    processes = next(make(workers=1).iterate())
    assert torch.equal(threads.latents, processes.latents) and torch.equal(threads.token_ids, processes.token_ids)


def test_a_state_of_other_sources_is_refused(make, files):
    other = Loader(CONFIG, TOKENIZER, TarImages(sorted(files.glob("*.tar"))), ["red"], None)
    state = other.state_dict()
    with pytest.raises(ValueError, match=r"map-style|stream|source\(s\)"):
        make().load_state_dict(state)


def test_a_stream_has_no_random_access(files):
    loader = Loader(CONFIG, TOKENIZER, TarImages(sorted(files.glob("*.tar"))), ["red"], None)
    with pytest.raises(ValueError, match="in order"):
        loader.batch(0)
    with pytest.raises(ValueError, match="images_per_row"):
        Loader(replace(CONFIG, images_per_row=1), TOKENIZER, TarImages(sorted(files.glob("*.tar"))), ["red"])


def test_unreadable_images_of_a_stream_are_replaced_counted_and_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for index in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 8), (index, 0, 0)).save(buffer, "PNG")
            _add(tar, f"{index:03d}.png", buffer.getvalue()[: 40 if index in (3, 8) else None])
            _add(tar, f"{index:03d}.txt", b"red")
    config = replace(CONFIG, text_fraction=0.0, shuffle_block=12)
    loader = Loader(config, TOKENIZER, TarImages([tmp_path / "x.tar"], "all"))
    levels = {level for batch in islice(loader.iterate(), 4) for _, row in _rows(batch) for level in row}
    assert levels == set(range(12)) - {3, 8}
    assert sorted(name for name, _ in loader.skipped) == [f"{tmp_path}/x.tar/{key}" for key in ("003", "008")]
