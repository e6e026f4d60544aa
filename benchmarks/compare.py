"""`python -m benchmarks --compare REF`: this tree against another commit, in turns, in one run on one machine.

REF is checked out into a temporary git worktree. Both sides are measured by this tree's benchmarks, each in a process
of its own, several times in turn, so that a drift of the machine meets both. What is compared are the quotients of the
rounds: their median, and the range from the least to the largest; a range that holds 1 shows nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import rows
from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent
_ROUNDS = 5  # of no difference at all, 1 quotient in 16 is on one side of 1 in every round


def main(reference: str, suites: list[str], options: argparse.Namespace) -> int:
    """Prints a table of every suite. -> 0, or 1 where a side failed a check or did not run."""
    try:
        commit = _git("rev-parse", "--verify", f"{reference}^{{commit}}")
    except SystemExit as error:
        raise SystemExit(f"--compare {reference}: this repository has no such commit ({error})") from None
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        _git("worktree", "add", "--detach", "--quiet", str(folder / "tree"), commit)
        try:
            sides = {"before": _side(folder / "before", folder / "tree"), "now": _side(folder / "now", ROOT)}
            codes = []
            for number in range(_ROUNDS):
                for label in sorted(sides, reverse=number % 2 == 1):  # each side is first in turn
                    name = commit if label == "before" else "this tree"
                    codes += [_measure(sides[label], number, suite, options, name) for suite in suites]
            for suite in suites:
                print(f"\n{suite}")
                print(compared(*(_rows(side, suite) for side in sides.values()), commit[:10]))
        finally:
            _git("worktree", "remove", "--force", str(folder / "tree"))
    return int(any(codes))


def compared(before: list[Row], now: list[Row], commit: str) -> str:
    """Medians of both sides and the speed-up, one line for each thing that both measured."""
    old, new = _times(before), _times(now)
    lines = [f"{'':86} {commit:>12} {'this tree':>12} {'speed-up':>9}   least to largest"]
    for key in new:
        if key in old:
            name = f"{key[1]:32} {key[2]:26} {key[3]:26}"
            times = f"{median(old[key].values()) * 1e3:9.3f} ms {median(new[key].values()) * 1e3:9.3f} ms"
            lines.append(f"{name} {times} {_speed_up(old[key], new[key])}")
    alone = [" ".join(key) for key in {*old} ^ {*new}]
    return "\n".join([*lines, *(f"measured on one side only: {name}" for name in alone)])


def _speed_up(before: dict[int, float], now: dict[int, float]) -> str:
    """Median and range of the quotients of the rounds in which neither side failed."""
    quotients = [before[number] / now[number] for number in before.keys() & now.keys()]
    if not quotients:
        return "no round in which both sides ran"
    least, largest = min(quotients), max(quotients)
    noise = "   within noise" if least <= 1 <= largest else ""
    return f"{median(quotients):8.3f}×   {least:.3f} to {largest:.3f}{noise}"


def _times(found: list[Row]) -> dict[tuple[str, ...], dict[int, float]]:
    """p50 by round."""
    times: dict[tuple[str, ...], dict[int, float]] = {}
    for row in found:
        if row["status"] == "ok" and "p50" in row:
            times.setdefault(rows.key(row), {})[row["round"]] = row["p50"]
    return times


def _side(folder: Path, tree: Path) -> Path:
    """A folder to run in: the package of `tree`, measured by this tree's benchmarks."""
    folder.mkdir()
    (folder / "transfusion").symlink_to(tree / "transfusion")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


def _measure(side: Path, number: int, suite: str, options: argparse.Namespace, commit: str) -> int:
    into = side / "rows" / str(number)
    command = [sys.executable, "-m", "benchmarks", "--suite", suite, "--ours", "--rows", str(into)]
    command += ["--filter", options.filter, *["--quick"] * options.quick]
    command += [] if options.limit is None else ["--limit", str(options.limit)]
    environment = {**os.environ, "PYTHONPATH": str(side), "BENCHMARK_COMMIT": commit}
    print(f"\n== {commit}", flush=True)
    return subprocess.run(command, cwd=side, env=environment, check=False).returncode


def _rows(side: Path, suite: str) -> list[Row]:
    """All that the rounds measured, each row with the number of its round."""
    return [
        {**row, "round": number}
        for number in range(_ROUNDS)
        for file in (side / "rows" / str(number)).glob(f"*/{suite}.jsonl")
        for row in rows.read(file)
    ]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
