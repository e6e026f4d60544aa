"""The way through the benchmarks that only a GPU takes, without one: see played_gpu.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report, rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")

# Why a baseline has no figure here: the first two are what the CPU cannot play.
MISSING = ("FlexAttention has no backward on a CPU", "No viable backend", "is not installed", "queries over a cache")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command leaves: rows of every suite."""
    folder = tmp_path_factory.mktemp("rows")
    command = [sys.executable, str(Path(__file__).with_name("played_gpu.py")), "--quick", "--rows", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "nvidia-h200"


def test_one_command_fills_every_suite(results: Path) -> None:
    found = {file.stem: rows.read(file) for file in results.glob("*.jsonl")}
    assert found.keys() == report._TABLES.keys()
    for row in (row for of_suite in found.values() for row in of_suite):
        assert row["device"] == "NVIDIA H200"
        ours = row["suite"] == "tiles" or row["baseline"].partition(",")[0] == "ours"
        known = row["status"] == "skipped" and not ours and any(reason in row["reason"] for reason in MISSING)
        assert row["status"] == "ok" or known, row
    groups = {row["shape"]["group"] for row in found["attention"] if row["baseline"] == "ours"}
    assert groups == set("abcdef")


def test_its_rows_fill_every_table(results: Path, tmp_path: Path) -> None:
    """They were a quick look, which no table shows: here they are taken for more."""
    for file in results.glob("*.jsonl"):
        rows.append([row | {"quick": False} for row in rows.read(file)], tmp_path / "nvidia-h200" / file.name)
    tables = {suite: report.table(suite, "nvidia-h200", tmp_path) for suite in report._TABLES}
    assert all(f"NVIDIA H200, torch {torch.__version__}" in table for table in tables.values())
    beside_others = [table for suite, table in tables.items() if suite not in ("tiles", "denoise")]
    assert all(re.search(r"\d×", table) for table in beside_others), tables
