"""A model's folder: shards as Hugging Face writes them, what a failure leaves, and the hub."""

import json
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from transfusion import Transfusion, recipes
from transfusion.model import pretrained
from transfusion.model.pretrained import plan_shards

CUT = 20_000  # bytes: several shards of the tiny model


def same(one: Transfusion, other: Transfusion) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_hold_what_the_index_says(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size=CUT)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2 and files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
        assert sum(t.nbytes for t in held.values()) <= CUT or len(held) == 1
    assert same(Transfusion.from_pretrained(tmp_path), model)


def test_weights_lie_as_those_of_a_new_model_do_and_need_the_file_no_more(tmp_path: Path) -> None:
    """Mapped from the file they would begin anywhere, and products of them round otherwise."""
    model = tiny.model()
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert all(weight.data_ptr() % 64 == 0 for weight in loaded.parameters())
    os.truncate(tmp_path / "model.safetensors", 0)
    assert same(loaded, model)


def test_shards_are_those_that_huggingface_hub_plans(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    state = tiny.model().state_dict()
    theirs = hub.split_torch_state_dict_into_shards(state, max_shard_size=CUT)
    ours = plan_shards({name: t.nbytes for name, t in state.items()}, CUT)
    assert len(ours) == len(theirs.filename_to_tensors) and set(ours) == set(theirs.filename_to_tensors)


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [([4, 4, 4], 12, [3]), ([4, 4, 4], 11, [2, 1]), ([20, 1, 1], 5, [1, 2]), ([1, 20, 1], 5, [1, 1, 1])],
)
def test_plan(sizes: list[int], limit: int, shards: list[int]) -> None:
    plan = plan_shards({str(i): size for i, size in enumerate(sizes)}, limit)
    assert [len(members) for members in plan.values()] == shards
    assert [name for members in plan.values() for name in members] == [str(i) for i in range(len(sizes))]


def test_a_later_save_in_another_number_of_files_leaves_nothing_of_the_earlier(tmp_path: Path) -> None:
    for seed, size in enumerate([CUT, 10**9, 2 * CUT, CUT]):
        model = tiny.model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert same(Transfusion.from_pretrained(tmp_path), model)
        weights = [name for name in names(tmp_path) if name.endswith("safetensors")]
        assert len(weights) == len(plan_shards({k: t.nbytes for k, t in model.state_dict().items()}, size))


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path, max_shard_size=CUT)
    (second,) = tmp_path.glob("model-00002-*")
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors is truncated"):
        Transfusion.from_pretrained(tmp_path)
    (first,) = tmp_path.glob("model-00001-*")
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors lacks"):
        Transfusion.from_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="no model-00002"):
        Transfusion.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        Transfusion.from_pretrained(tmp_path)


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the write fails half-way, with a real OSError."""
    first = tiny.model(seed=1)
    first.save_pretrained(tmp_path)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(Exception, match=r"File too large|os error 27"):
            tiny.model(seed=2).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == before
    assert same(Transfusion.from_pretrained(tmp_path), first)


def test_a_shard_size_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        tiny.model().save_pretrained(tmp_path, max_shard_size=0)


def test_hub_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here: what is uploaded is what is downloaded; no network."""
    hub = pytest.importorskip("huggingface_hub")
    said: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            said["token"] = token

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            said["private"], said["exist_ok"] = private, exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, delete_patterns: list[str], **_: Any) -> None:
            said["deleted"] = delete_patterns
            (tmp_path / repo_id).mkdir(parents=True)
            for name in os.listdir(folder_path):
                (tmp_path / repo_id / name).write_bytes((Path(folder_path) / name).read_bytes())

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    model = tiny.model()
    assert model.push_to_hub("me/mine", private=True, token="t") == "https://hub/me/mine"
    assert said == {"token": "t", "private": True, "exist_ok": True} | {"deleted": said["deleted"]}
    assert names(tmp_path / "me" / "mine") == ["config.toml", "model.safetensors"]
    assert same(Transfusion.from_pretrained("me/mine"), model)


def test_the_calls_to_the_hub_fit_its_signatures() -> None:
    import inspect

    hub = pytest.importorskip("huggingface_hub")
    api = hub.HfApi
    inspect.signature(api).bind(token=None)
    inspect.signature(api.create_repo).bind(None, "a/b", private=True, exist_ok=True)
    upload = {"repo_id": "a/b", "folder_path": "f", "delete_patterns": ["*"], "commit_message": "m"}
    inspect.signature(api.upload_folder).bind(None, **upload)
    inspect.signature(hub.snapshot_download).bind("a/b", allow_patterns=["*"])


def test_a_missing_hub_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        tiny.model().push_to_hub("me/mine")


def test_a_folder_wins_over_the_hub_and_over_what_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "_hub", lambda purpose: SimpleNamespace())
    for name in ("runs/mine", next(iter(recipes.trained()))):
        tiny.model().save_pretrained(name)
        assert same(Transfusion.from_pretrained(name), tiny.model())


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_read_in_another_type(tmp_path: Path, saved: torch.dtype) -> None:
    """None is that of the file, but for float16 on a CPU."""
    model = tiny.model().to(saved)
    model.save_pretrained(tmp_path)
    kept, half = (Transfusion.from_pretrained(tmp_path, dtype=dtype) for dtype in (None, torch.float16))
    expected = torch.float32 if saved == torch.float16 else saved
    assert {weight.dtype for weight in kept.parameters()} == {expected}
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    assert same(kept.to(saved), model) and same(half, model.half())
