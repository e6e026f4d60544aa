"""A checkpoint is written aside by all ranks, then renamed: whatever happens, the last whole one is still there.

    checkpoints/step-00001000/   .metadata, __0_0.distcp, ...  torch.distributed.checkpoint: tensors by name, in shards
                                 run.json                      the step, the place in the data, every file's size and
                                                               checksum

Tensors are saved by name and shape, so any number of ranks can load what any other number wrote.
"""

import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from transfusion.training.world import World

_NAME = re.compile(r"step-(\d{8})")
_RECORD = "run.json"
_CHECKSUM = ".crc32"
_ALONE = "torch.distributed is disabled"  # torch's remark that one process saves, which is as it should be


class _Writer(FileSystemWriter):
    """Writes this rank's files and syncs them to disk, each with its checksum beside it until all ranks are done."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self._folder = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "TorchFuture[list[WriteResult]]":
        try:
            results = super().write_data(plan, planner)
        except RuntimeError as error:  # of the archive's writer, whatever kept the file from being written
            if cause := _cause(error):
                raise OSError(cause.errno, cause.strerror) from error
            raise
        for name in {result.storage_data.relative_path for result in results.wait()}:
            (self._folder / f"{name}{_CHECKSUM}").write_text(str(_checksum(self._folder / name)), encoding="ascii")
        return results


@dataclass
class _Writing:
    """A checkpoint being written while training continues."""

    path: Path
    record: dict[str, Any]
    future: "Future[Any]"


def written(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; none where there is no folder."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def last_step(folder: Path) -> int | None:
    """Step of the newest checkpoint in `folder`; None where there is none."""
    return int(written(folder)[-1].name.removeprefix("step-")) if written(folder) else None


class Checkpoints:
    """The checkpoints `step-00001000`, ... in one folder, of which the last `keep` are kept.

    A context manager: on exit, normal or by an error, any write in progress is finished first.
    """

    def __init__(self, folder: Path, keep: int, world: World, beside: bool = False) -> None:
        self.folder, self.keep, self.world, self.beside = folder, keep, world, beside
        self._writing: _Writing | None = None
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        world.total([0])

    def paths(self) -> list[Path]:
        """Oldest first."""
        return written(self.folder)

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
        """Writes tensors and `record` (JSON), once per step; every rank must call this. With `beside`, returns once
        they are copied.

        Raises `OSError` if a disk is full or broken, saying which checkpoint survives: on every rank, and with `beside`
        at the next call of `save` or `wait`.
        """
        self.wait()
        path = self.folder / f"step-{step:08d}"
        aside = path.with_suffix(".tmp")
        if any(self.world.total([int(self.world.main and path.exists())])):  # a signal at a step that was just saved
            return path
        if self.world.main:
            shutil.rmtree(aside, ignore_errors=True)
        self.world.total([0])
        record = {"step": step, "ranks": self.world.size, **record}
        alone = self.world.size == 1
        try:
            writer = _Writer(aside)
            if self.beside:
                # for the thread that writes, which outlives this call
                warnings.filterwarnings("ignore", message=_ALONE)
                group = self.world.background
                future = state_dict_saver.async_save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
                assert isinstance(future, Future)
                self._writing = _Writing(path, record, future)
            else:
                with _quiet():
                    state_dict_saver.save(
                        tensors, storage_writer=writer, process_group=self.world.control, no_dist=alone
                    )
                self._finish(path, record)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise self._failure(path, error) from error
        return path

    def poll(self) -> None:
        """Gives a checkpoint that has been written by now its name and drops the oldest; no rank waits for another."""
        if self._writing and self.world.main and self._writing.future.done():
            self._complete()

    def wait(self) -> None:
        """Waits until nothing is being written. Raises what `save` would have."""
        if self._writing:
            self._complete()
        self.world.total([0])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the write; after an error, for this rank alone, and prints what fails then: that error goes on."""
        if kind is None:
            return self.wait()
        try:
            if self._writing:
                self._complete()
        except Exception as error:
            print(f"the checkpoint under way is lost too: {error}", file=sys.stderr)

    def _complete(self) -> None:
        assert self._writing is not None
        writing, self._writing = self._writing, None
        try:
            writing.future.result()
            self._finish(writing.path, writing.record)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise self._failure(writing.path, error) from error

    def _finish(self, path: Path, record: dict[str, Any]) -> None:
        if not self.world.main:
            return
        aside = path.with_suffix(".tmp")
        checksums = {".metadata": _checksum(aside / ".metadata")}
        for beside in sorted(aside.glob(f"*{_CHECKSUM}")):
            checksums[beside.name.removesuffix(_CHECKSUM)] = int(beside.read_text(encoding="ascii"))
            beside.unlink()
        sizes = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        with open(aside / _RECORD, "w", encoding="utf-8") as file:
            json.dump({**record, "files": sizes, "crc32": checksums}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        for old in self.paths()[: -self.keep]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        doomed = path.with_suffix(".old.tmp")  # by one rename: half a checkpoint never bears a checkpoint's name
        os.replace(path, doomed)
        shutil.rmtree(doomed)

    def _failure(self, path: Path, error: BaseException) -> OSError:
        if self.world.main:
            shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
        last = self.paths()[-1] if self.paths() else "none"
        return OSError(f"cannot write {path}: {_reason(error)}; the last whole checkpoint is {last}")

    def load_last(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """`read` of the newest. -> its record, or None where there is no checkpoint."""
        return read(self.paths()[-1], tensors, self.world) if self.paths() else None


def read(path: Path, tensors: dict[str, Tensor], world: World, partly: bool = False) -> dict[str, Any]:
    """Reads the checkpoint `path` into `tensors`, in place. -> its record (the JSON that `save` was given).

    Raises `ValueError` naming the path where a file is missing, cut short or not what was written, or where names and
    shapes differ; `partly` lets the checkpoint hold more than `tensors`. The metadata is a pickle: load only
    checkpoints you trust as code.
    """
    try:
        record = _whole_record(path, world)
        reader = FileSystemReader(path)
        saved = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint ({error}); delete it to go on from the one before"
        ) from error
    wanted = {name: size for name, size in saved.items() if name in tensors} if partly else saved
    if different := _differences(wanted, tensors):
        raise ValueError(f"{path} is of another model: {different}")
    try:
        with _quiet():
            state_dict_loader.load(tensors, storage_reader=reader, process_group=world.control, no_dist=world.size == 1)
    except (CheckpointException, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}; delete it to go on from the one before") from error
    return record


def _whole_record(path: Path, world: World) -> dict[str, Any]:
    """The record of a checkpoint, all of whose files were found unchanged; each rank verifies its share."""
    record: dict[str, Any] = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"{_RECORD} holds {type(record).__name__}")
    for name, size in record["files"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has {(path / name).stat().st_size} bytes of {size}")
    checksums = record.get("crc32", {})  # which checkpoints before this was kept do not have
    own = sorted(checksums)[world.rank :: world.size]
    changed = [name for name in own if not _has_checksum(path / name, checksums[name])]
    for names in world.gather(changed):  # all ranks continue, or none
        if names:
            raise ValueError(f"the bytes of {names[0]} are not those that were written")
    return record


def _checksum(file: Path) -> int:
    crc = 0
    with open(file, "rb") as stream:
        while part := stream.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


def _has_checksum(file: Path, checksum: int) -> bool:
    try:
        return _checksum(file) == checksum
    except OSError:  # a disk that cannot read it back
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        yield


def _differences(saved: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Why `tensors` cannot be loaded from `saved`, in words; empty if they can."""
    for name in sorted({*saved, *tensors}):
        if name not in saved:
            return f"it has no {name}"
        if name not in tensors:
            return f"only it has {name}"
        assert isinstance(saved[name], TensorStorageMetadata)
        if tuple(saved[name].size) != tuple(tensors[name].shape):
            return f"{name} is {tuple(saved[name].size)} there and {tuple(tensors[name].shape)} here"
    return ""


def _cause(error: BaseException) -> OSError | None:
    """The operating system's error that caused `error`, if any."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


def _reason(error: BaseException) -> str:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        first = {rank: str(failure).partition("\n")[0] for rank, (failure, _) in sorted(error.failures.items())}
        return "; ".join(f"rank {rank}: {line}" for rank, line in first.items())
    return str(error)
