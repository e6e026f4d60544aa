"""`python -m benchmarks --compare REF`: this tree against another commit, in turns, in one run on one machine.

REF is checked out into a temporary git worktree. Both sides are measured by this tree's benchmarks, each in a process
of its own, several times in turn, so that a drift of the machine meets both; the medians of the rounds are compared.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import rows
from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent
_ROUNDS = 3


def main(reference: str, suite: str, chosen: str, quick: bool) -> int:
    """Prints a table. -> 0, or 1 where a side failed a check or did not run."""
    commit = _git("rev-parse", "--verify", f"{reference}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        _git("worktree", "add", "--detach", "--quiet", str(folder / "tree"), commit)
        try:
            sides = {"before": _side(folder / "before", folder / "tree"), "now": _side(folder / "now", ROOT)}
            codes = [
                _measure(side, suite, chosen, quick, commit if label == "before" else "this tree")
                for _ in range(_ROUNDS)
                for label, side in sides.items()
            ]
            print(compared(*(_rows(side, suite) for side in sides.values()), commit[:10]))
        finally:
            _git("worktree", "remove", "--force", str(folder / "tree"))
    return int(any(codes))


def compared(before: list[Row], now: list[Row], commit: str) -> str:
    """Medians of both sides and their ratio, one line for each thing that both measured."""
    old, new = _medians(before), _medians(now)
    lines = [f"{'':86} {commit:>12} {'this tree':>12} {'speed-up':>9}"]
    for key in new:
        if key in old:
            name = f"{key[1]:32} {key[2]:26} {key[3]:26}"
            lines.append(f"{name} {old[key] * 1e3:9.3f} ms {new[key] * 1e3:9.3f} ms {old[key] / new[key]:8.3f}×")
    alone = [" ".join(key) for key in {*old} ^ {*new}]
    return "\n".join([*lines, *(f"measured on one side only: {name}" for name in alone)])


def _medians(found: list[Row]) -> dict[tuple[str, ...], float]:
    times: dict[tuple[str, ...], list[float]] = {}
    for row in found:
        if row["status"] == "ok" and "p50" in row:
            times.setdefault(rows.key(row), []).append(row["p50"])
    return {key: median(each) for key, each in times.items()}


def _side(folder: Path, tree: Path) -> Path:
    """A folder to run in: the package of `tree`, measured by this tree's benchmarks."""
    folder.mkdir()
    (folder / "transfusion").symlink_to(tree / "transfusion")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


def _measure(side: Path, suite: str, chosen: str, quick: bool, commit: str) -> int:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--suite",
        suite,
        "--filter",
        chosen or "ours",
        "--rows",
        str(side / "rows"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(side), "BENCHMARK_COMMIT": commit}
    print(f"\n== {commit}", flush=True)
    return subprocess.run([*command, *["--quick"] * quick], cwd=side, env=environment, check=False).returncode


def _rows(side: Path, suite: str) -> list[Row]:
    return [row for file in (side / "rows").glob(f"*/{suite}.jsonl") for row in rows.read(file)]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
