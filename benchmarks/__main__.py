"""`python -m benchmarks`: checks, then times; rows go to benchmarks/results/<gpu or cpu>/<suite>.jsonl.

    python -m benchmarks                              every suite on this machine
    python -m benchmarks --suite attention --filter 7b --quick
    python -m benchmarks --suite attention --budget 540 --resume      in calls of nine minutes, until none is left
    python -m benchmarks --compare HEAD~1             what is ours, against another commit, in turns, in one run
    python -m benchmarks --report                     plots, and the tables of README.md, from the rows

Exits with 1 where a check failed: such a kernel is not timed. With 2 where nothing is chosen, or options do not fit.
With 3 where the GPU was lost, or a pair did not end: its row says so, and --resume goes on with the next.
"""

import argparse
import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import rows
from benchmarks.cases import DEVICE
from benchmarks.clock import QUICK, Effort

SUITES = ("attention", "ops", "host", "tiles", "train", "denoise", "generation")


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0, or 1 where a check failed, or 2 where there is nothing to do, or 3 where the GPU was lost."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.report:
        from benchmarks import report

        if options != parser.parse_args(["--report"]):
            parser.error("--report takes every row of benchmarks/results and no other option: leave the others out")
        return report.main()
    if options.compare and (options.rows or options.budget is not None or options.resume):
        parser.error("--compare keeps no rows and runs whole rounds: leave out --rows, --budget and --resume")
    if options.compare and options.suite == "tiles":
        parser.error('--compare compares times, and the suite "tiles" counts tiles: choose another --suite')
    work = _work(options)
    if not work:
        parser.error(f"nothing matches --filter {options.filter!r}; --list shows what there is")
    if options.list:
        print("\n".join("  ".join(item) for item in work))
        return 0
    if options.compare:
        from benchmarks import compare

        return compare.main(options.compare, list(dict.fromkeys(item[0] for item in work)), options)
    folder = options.rows or rows.RESULTS
    try:  # before hours of work, not after
        rows.prepare(folder)
    except OSError as error:
        parser.error(f"no rows can be written to {folder}: {error}")
    return _run(work, options)


def _work(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(suite, case, baseline) of what the options choose."""
    suites = (options.suite,) if options.suite else SUITES
    if options.compare and not options.suite:
        suites = tuple(suite for suite in suites if suite != "tiles")  # which measures no time
    work = [(suite, *pair) for suite in suites for pair in _module(suite).pairs()]
    work = [item for item in work if options.filter in " ".join(item)]
    if not (options.ours or options.compare):
        return work
    # in "generation" each pair times ours beside another way
    return [
        item
        for item in work
        if "ours" in item[2] or item[0] == "generation" or (options.filter and options.filter in item[2])
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--filter", default="", metavar="TEXT", help="only what has TEXT in 'suite case baseline'")
    parser.add_argument("--ours", action="store_true", help="no baselines but those that the filter names")
    parser.add_argument("--quick", action="store_true", help="a few calls each, for a look; rows say so")
    parser.add_argument("--list", action="store_true", help="names, and nothing else")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing after so long; say what is left")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=300.0 if DEVICE == "cuda" else None,
        help="of one pair, which ends the run where it takes longer (here by default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="skip what this commit has rows of")
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="where rows go; default: benchmarks/results")
    parser.add_argument("--compare", metavar="REF", help="against another commit; implies --ours")
    parser.add_argument("--report", action="store_true", help="plots and README tables from the rows")
    return parser


def _module(suite: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{suite}")


def _run(work: list[tuple[str, str, str]], options: argparse.Namespace) -> int:
    began, failed, left = time.monotonic(), [], []
    files = {suite: rows.path(suite, options.rows or rows.RESULTS) for suite, _, _ in work}
    before = {suite: {key[:3] for key in rows.done(rows.read(file), options.quick)} for suite, file in files.items()}
    effort = QUICK if options.quick else Effort()
    for suite, case, baseline in work:
        if options.resume and (suite, case, baseline) in before[suite]:
            continue
        if options.budget is not None and time.monotonic() - began > options.budget:
            left.append((suite, case, baseline))
            continue
        measured: list[rows.Row] = []
        try:
            with _ending((suite, case, baseline), measured, files[suite], options.limit):
                for row in _module(suite).run(case, baseline, *([] if suite == "tiles" else [effort])):
                    measured.append(row | {"quick": options.quick})
                    print(_line(row), flush=True)
        except rows.DeviceLostError as error:
            rows.append(measured, files[suite])
            print(f"\nthe GPU is lost to this process: {error}; --resume goes on with the next", file=sys.stderr)
            return 3
        # a pair at a time and at once on disk: a run that is killed loses the pair it was measuring, and nothing else
        rows.append(measured, files[suite])
        failed += [row for row in measured if row["status"] == "failed"]
    if left:
        print(f"\nthe budget is spent; {len(left)} left, --resume goes on with them:")
        print("\n".join("  " + "  ".join(item) for item in left))
    if failed:
        print(f"\n{len(failed)} FAILED and were not timed:\n" + "\n".join(_line(row) for row in failed))
    return 1 if failed else 0


@contextmanager
def _ending(pair: tuple[str, str, str], measured: list[rows.Row], file: Path, seconds: float | None) -> Iterator[None]:
    """Ends the process, its rows kept, where a pair takes longer: a launch that hangs ends by nothing else."""
    if seconds is None:
        yield
        return

    def end() -> None:
        row = rows.row(*pair, "pair", "failed", reason=f"it did not end within {seconds:g} s (--limit)")
        rows.append([*measured, row], file)
        print(_line(row), flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # what `end` has begun ends the process


def _line(row: dict[str, Any]) -> str:
    """A row, short."""
    what = f"{row['suite']:9} {row['case']:32} {row['baseline']:26} {row['measure']:14}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['reason']}"
    figures = [f"{row['p50'] * 1e3:9.3f} ms [{row['p20'] * 1e3:.3f}, {row['p80'] * 1e3:.3f}]"] if "p50" in row else []
    for key, name in (
        ("tflops", "TFLOP/s"),
        ("gigabytes_per_second", "GB/s"),
        ("share", "of the ceiling"),
        ("overhead", "× the least tiles"),
        ("times_ours", "× our time"),
    ):
        if row.get(key) is not None:
            figures.append(f"{row[key]:.3g} {name}")
    return f"{what} " + "  ".join(figures)


if __name__ == "__main__":
    sys.exit(main())
