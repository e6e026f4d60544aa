"""Checkpoints of one process: a full disk, a file cut short, another model, and how many are kept."""

import json
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

from transfusion.training import World
from transfusion.training.checkpoint import Checkpoints

ALONE = World(torch.device("cpu"))


def read(checkpoints: Checkpoints, size: int = 1000) -> tuple[torch.Tensor, dict]:
    weights = torch.full((size,), torch.nan)
    record = checkpoints.load_last({"weights": weights})
    assert record is not None
    return weights, record


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, beside: bool) -> None:
    """A file size limit stands in for the full disk: the write fails half-way, with a real OSError."""
    checkpoints = Checkpoints(tmp_path, 2, ALONE, beside)
    first = checkpoints.save(1, {"weights": torch.ones(1000)}, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*step-00000002: .*File too large; .* is .*step-00000001"):
            checkpoints.save(2, {"weights": torch.ones(1_000_000)}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoints.paths() == [first]
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert torch.equal(read(checkpoints)[0], torch.ones(1000))
    assert checkpoints.save(2, {"weights": torch.ones(1000)}, {}).name == "step-00000002"  # once there is room again
    checkpoints.wait()


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_beside_a_write_keeps_the_checkpoint(tmp_path: Path, fails: bool, capsys) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE, beside=True)
    with pytest.raises(ConnectionError, match="no more data"), checkpoints:
        checkpoints.save(1, {"weights": torch.ones(1000)}, {})
        if fails:
            checkpoints._finish = lambda *_: (_ for _ in ()).throw(OSError("the disk is full"))
        raise ConnectionError("no more data")
    assert [path.name for path in tmp_path.iterdir()] == ([] if fails else ["step-00000001"])
    assert ("is lost too: cannot write" in capsys.readouterr().err) == fails
    if not fails:
        assert torch.equal(read(checkpoints)[0], torch.ones(1000))


@pytest.mark.parametrize("cut", [0, 10, 2000])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, name: str, cut: int) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    path = checkpoints.save(3, {"weights": torch.ones(1000)}, {})
    if cut >= (path / name).stat().st_size:
        cut = (path / name).stat().st_size - 1
    (path / name).write_bytes((path / name).read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"step-00000003 is damaged .*has \d+ bytes of \d+"):
        read(checkpoints)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json"])
def test_so_is_one_with_a_file_missing(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    path = checkpoints.save(3, {"weights": torch.ones(1000)}, {})
    (path / name).unlink()
    with pytest.raises(ValueError, match="step-00000003 is damaged or no checkpoint"):
        read(checkpoints)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_and_one_whose_bytes_are_nonsense(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    path = checkpoints.save(3, {"weights": torch.ones(1000)}, {})
    (path / name).write_bytes(b"x" * (path / name).stat().st_size)
    with pytest.raises(ValueError, match=r"step-00000003.* delete it to go on from the one before"):
        read(checkpoints)


@pytest.mark.parametrize("beside", [False, True])
def test_a_flipped_bit_is_found(tmp_path: Path, beside: bool) -> None:
    """Anywhere: in the numbers, which nothing else would show, as in what surrounds them."""
    with Checkpoints(tmp_path, 2, ALONE, beside) as checkpoints:
        path = checkpoints.save(3, {"weights": torch.ones(1000)}, {})
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "__0_0.distcp", "run.json"]
    for name in (".metadata", "__0_0.distcp"):
        whole = (path / name).read_bytes()
        for place in random.sample(range(8 * len(whole)), 20):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            (path / name).write_bytes(flipped)
            with pytest.raises(ValueError, match=f"step-00000003 is damaged .*bytes of {name} are not those"):
                read(checkpoints)
        (path / name).write_bytes(whole)
    assert torch.equal(read(checkpoints)[0], torch.ones(1000))


def test_one_written_before_checksums_were_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    file = checkpoints.save(3, {"weights": torch.ones(1000)}, {}) / "run.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "crc32"}))
    assert torch.equal(read(checkpoints)[0], torch.ones(1000))
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"step-00000003 is damaged or no checkpoint .*run.json holds list"):
        read(checkpoints)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weights": torch.ones(3)}, r"weights is \(2,\) there and \(3,\) here"),
        ({"weights": torch.ones(2), "more": torch.ones(1)}, "it has no more"),
        ({}, "only it has weights"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.save(0, {"weights": torch.ones(2)}, {})
    with pytest.raises(ValueError, match=f"step-00000000 is of another model: {message}"):
        checkpoints.load_last(tensors)


def test_old_checkpoints_go_and_the_record_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    assert checkpoints.load_last({}) is None
    for step in (1, 2, 3, 3):
        checkpoints.save(step, {"weights": torch.full((4,), float(step))}, {"data": {"row": step}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    weights, record = read(checkpoints, 4)
    assert torch.equal(weights, torch.full((4,), 3.0))
    assert (record["step"], record["ranks"], record["data"]) == (3, 1, {"row": 3})
    assert json.loads((tmp_path / "step-00000003" / "run.json").read_text()) == record


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    """A signal at a step that was just saved asks for it again: to remove the first before the second has its name
    would leave nothing, were the process killed in between."""
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    path = checkpoints.save(4, {"weights": torch.ones(4)}, {})
    made = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert checkpoints.save(4, {"weights": torch.ones(4)}, {}) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == made


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    (tmp_path / "step-00000004.tmp").mkdir()
    (tmp_path / "step-00000004.tmp" / "__0_0.distcp").write_bytes(b"half")
    Checkpoints(tmp_path, 2, ALONE)
    assert list(tmp_path.iterdir()) == []
