"""Rows of results: one JSON object a line, appended to benchmarks/results/<gpu or cpu>/<suite>.jsonl.

A row says what was measured (suite, case, baseline, measure), how it went (status "ok", "skipped" or "failed", with a
reason), quantiles in seconds, what follows from them, and where: machine, versions, commit, date.
"""

import functools
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DEVICE
from transfusion.kernels.registry import TRITON_INSTALLED
from transfusion.kernels.testing import in_a_line, is_lost

RESULTS = Path(__file__).parent / "results"
KEY = ("suite", "case", "baseline", "measure")

Row = dict[str, Any]


def machine() -> str:
    """The folder of this machine's rows: the GPU's name in lower case, or cpu."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()) if DEVICE == "cuda" else "cpu"


def path(suite: str, folder: Path = RESULTS) -> Path:
    """Where rows of `suite` go."""
    return folder / machine() / f"{suite}.jsonl"


@functools.cache
def environment() -> Row:
    """Machine, versions and commit. A tree without git names its commit in BENCHMARK_COMMIT."""
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name(0) if DEVICE == "cuda" else _processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        **_commit(),
    }


def row(suite: str, case: str, baseline: str, measure: str, status: str, **values: Any) -> Row:
    """A row of this machine, now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    key = dict(zip(KEY, (suite, case, baseline, measure), strict=True))
    return {**key, "status": status, **values, "date": now, **environment()}


class DeviceLostError(RuntimeError):
    """An error after which this process can use the GPU no more: whatever it measured now would fail like it."""


def explained(work: Iterator[Row], pair: tuple[str, str, str], measures: Sequence[str], ours: bool) -> Iterator[Row]:
    """The rows of `work`; where it ends in an error, one more with the reason, of the first measure that has none yet.

    Its status is "failed" where the work is `ours`, and "skipped" where it is not, or finds no memory. Raises
    `DeviceLostError` after that row where the GPU is lost.
    """
    known = []
    try:
        for line in work:
            known.append(line["measure"])
            yield line
    except Exception as error:  # a compiler's, a launch's, a library's
        reason, no_memory = in_a_line(error), isinstance(error, torch.OutOfMemoryError)
    else:
        return
    status = "failed" if ours and not no_memory else "skipped"
    measure = next((each for each in measures if each not in known), measures[-1])
    yield row(*pair, measure, status, reason=reason)
    if is_lost(DEVICE):
        raise DeviceLostError(reason)


def prepare(folder: Path) -> None:
    """Makes the folder of this machine's rows. Raises `OSError` where nothing can be written to it."""
    path("", folder).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path("", folder).parent):
        pass


def append(rows: list[Row], file: Path) -> None:
    """Adds `rows` to `file`, each as one whole line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(line) + "\n" for line in rows))


def read(file: Path) -> list[Row]:
    """The rows of a file, oldest first; none where it is missing. Raises `ValueError` naming a malformed line."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} is no row: {error}") from error
    return rows


def key(line: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(line[name] for name in KEY)


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each key, in the order of first appearance."""
    last: dict[tuple[str, ...], Row] = {}
    for line in rows:
        last[key(line)] = line
    return list(last.values())


def done(rows: list[Row], quick: bool = False) -> set[tuple[str, ...]]:
    """Keys that this commit, clean or not alike, has rows of with these versions; rows of a quick look are so for
    another quick look alone."""
    here = environment()
    same = ("commit", "dirty", "torch", "triton", "device")
    valid = (line for line in rows if quick or not line.get("quick"))
    return {key(line) for line in valid if all(line.get(name) == here[name] for name in same)}


def _commit() -> Row:
    named = os.environ.get("BENCHMARK_COMMIT")
    if named:
        return {"commit": named, "dirty": None}
    root = str(Path(__file__).parent.parent)
    changed = _output("git", "-C", root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _output("git", "-C", root, "rev-parse", "HEAD") or "unknown", "dirty": bool(changed)}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _triton_version() -> str | None:
    if not TRITON_INSTALLED:
        return None
    from importlib.metadata import version

    return version("triton")


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
