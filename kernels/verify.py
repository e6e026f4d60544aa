"""Every Triton kernel against its reference on this machine: errors, bounds, and exit status 1 where one fails.

    python -m transfusion.kernels.verify [--op NAME] [--seed N] [--jobs N] [--junit FILE]

On a GPU the kernels run there, in bfloat16 too, and most of the time goes into compiling them: several processes share
it. Elsewhere they run in Triton's interpreter, which must be chosen before triton is imported: the command starts
itself again with TRITON_INTERPRET=1.
"""

import argparse
import multiprocessing
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import torch

from transfusion.kernels import registry
from transfusion.kernels.attention import check as attention
from transfusion.kernels.denoise_step import check as denoise_step
from transfusion.kernels.diffusion_loss import check as diffusion_loss
from transfusion.kernels.mask_tiles import check as mask_tiles
from transfusion.kernels.patchify_noise import check as patchify_noise
from transfusion.kernels.testing import Verdict, in_a_line, is_lost, poison_empty

Check = Callable[[], dict[str, Verdict]]
Checks = Callable[[torch.device, torch.dtype, torch.Generator], Iterator[tuple[str, Check]]]

CHECKS: dict[str, Checks] = {
    "transfusion_attention": attention.checks,
    "patchify_noise": patchify_noise.checks,
    "diffusion_loss": diffusion_loss.checks,
    "denoise_step": denoise_step.checks,
    "mask_tiles": mask_tiles.checks,
}


class Row(NamedTuple):
    """One call of one op: the verdict on each of its results, forward and gradients, or the error that it ended in."""

    op: str
    dtype: torch.dtype
    case: str
    verdicts: dict[str, Verdict]
    error: str = ""

    @property
    def passed(self) -> bool:
        """Every result keeps its bound."""
        return not self.error and all(verdict.passed for verdict in self.verdicts.values())

    @property
    def worst(self) -> str:
        """The result that is nearest to its bound, or furthest past it."""

        def share(name: str) -> float:
            error, bound = self.verdicts[name]
            return error / bound if bound else (torch.inf if error else 0.0)

        return max(self.verdicts, key=share)


def verify(
    device: torch.device | str | None = None, ops: Sequence[str] | None = None, seed: int | None = None, jobs: int = 1
) -> Iterator[Row]:
    """Rows of every op (or those named), one after the other, on `device` (default: the GPU where there is one).

    Inputs are drawn from `seed`, fresh by default; whatever a kernel leaves unwritten is NaN. A case that ends in an
    error has failed, and the next follows, unless the GPU is lost to the process. Off a GPU the process must have been
    started with TRITON_INTERPRET=1, else every row has a `RuntimeError`. jobs: processes that share ops and
    dtypes; the rows are the same, but those of one op and dtype come at once, in the order in which parts are done. A
    process that dies makes a failed row for each part that is lost with it.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [torch.float32, torch.float16] + ([] if registry.TRITON_INTERPRET else [torch.bfloat16])
    seed = random.randrange(2**32) if seed is None else seed
    parts = [
        (device, op, dtype, seed)
        for op in ops or CHECKS
        for dtype in (dtypes if op in registry.OPS else [torch.int32])  # tiles are whole numbers
    ]
    if jobs == 1:
        for part in parts:
            yield from _part(*part)
        return
    spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with ProcessPoolExecutor(min(jobs, len(parts)), spawn) as pool:
        running = {_submitted(pool, part): part for part in parts}
        try:
            for each in as_completed(running):
                try:
                    yield from each.result()
                except BrokenExecutor as error:
                    _, op, dtype, _ = running[each]
                    yield Row(op, dtype, "all of its cases", {}, in_a_line(error))
        finally:
            pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, part: tuple[Any, ...]) -> "Future[list[Row]]":
    try:
        return pool.submit(_whole_part, *part)
    except BrokenExecutor as error:  # by a part before
        future: Future[list[Row]] = Future()
        future.set_exception(error)
        return future


def _part(device: torch.device, op: str, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Rows of one op in one dtype; its inputs are the same whatever else is verified."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {op} {dtype}").randrange(2**63))
    cases = CHECKS[op](device, dtype, generator)
    while True:
        try:
            name, check = next(cases)
        except StopIteration:
            return
        except Exception as error:  # inputs could not be made, on a GPU that an earlier part has lost
            yield Row(op, dtype, "the inputs of the rest", {}, in_a_line(error))
            return
        row = Row(op, dtype, name, *_checked(check))
        yield row
        if row.error and is_lost(device):
            return


def _whole_part(device: torch.device, op: str, dtype: torch.dtype, seed: int) -> list[Row]:
    return list(_part(device, op, dtype, seed))


def _checked(check: Check) -> tuple[dict[str, Verdict], str]:
    """The case's verdicts, or the error that it ended in; while it runs, and only then, torch's empty tensors are full
    of NaN."""
    with ExitStack() as patches:
        poison_empty(lambda owner, name, value: patches.enter_context(mock.patch.object(owner, name, value)))
        try:
            return check(), ""
        except Exception as error:  # from the compiler, the launch or the op itself
            return {}, in_a_line(error)


def header(device: torch.device, seed: int) -> str:
    """Versions, device, how the kernels run, seed."""
    if registry.TRITON_INTERPRET:
        how = "Triton interpreter (no GPU code; bfloat16 is left out, the interpreter computes it wrongly)"
    else:
        how = f"{torch.cuda.get_device_name(device)}, capability {torch.cuda.get_device_capability(device)}"
    import triton  # not a requirement of this module's import

    versions = f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    rule = "error <= 2 x error of the eager computation (1 x for element-wise results) + one ulp, against float64"
    return f"{versions}\ndevice: {device}, {how}\nrule: {rule}; lists of tiles exactly\nseed: {seed}\n"


_COLUMNS = f"{'op':21}  {'dtype':8}  {'case':32}  {'worst result':15}  {'error':>9}  {'bound':>9}  "


def format_row(row: Row) -> str:
    """A line of the table, or one for every result that fails, or for the error."""

    def line(name: str, status: str) -> str:
        error, bound = row.verdicts[name]
        dtype = str(row.dtype).removeprefix("torch.")
        return f"{row.op:21}  {dtype:8}  {row.case:32}  {name:15}  {error:9.2e}  {bound:9.2e}  {status}"

    if row.error:
        return f"{row.op:21}  {str(row.dtype).removeprefix('torch.'):8}  {row.case:32}  FAIL: {row.error}"
    if row.passed:
        return line(row.worst, "pass")
    return "\n".join(line(name, "FAIL") for name, verdict in row.verdicts.items() if not verdict.passed)


def write_junit(rows: Sequence[Row], file: Path) -> None:
    """One JUnit test case for each row."""
    failures = sum(not row.passed for row in rows)
    suite = ElementTree.Element("testsuite", name="verify", tests=str(len(rows)), failures=str(failures))
    for row in rows:
        name = f"{row.case}[{str(row.dtype).removeprefix('torch.')}]"
        case = ElementTree.SubElement(suite, "testcase", classname=row.op, name=name)
        if not row.passed:
            message = row.error or "error above bound"
            ElementTree.SubElement(case, "failure", message=message).text = format_row(row)
    file.write_bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def _check_report(parser: argparse.ArgumentParser, file: Path) -> None:
    """Ends the command with status 2 where no report could be written; an existing one is not touched yet."""
    there = file.exists()
    try:
        with open(file, "ab"):
            pass
        if not there:
            file.unlink()
    except OSError as error:
        parser.error(f"--junit {file}: {error.strerror}; name a file in a folder that can be written to")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="verify", description="Check every Triton kernel against its reference.")
    parser.add_argument("--op", action="append", choices=CHECKS, help="may be repeated; default: every op")
    parser.add_argument("--seed", type=int, help="of the inputs; default: a fresh one, which is printed")
    parser.add_argument("--junit", metavar="FILE", help="write the rows as JUnit XML too")
    several = min(os.cpu_count() or 1, 12) if torch.cuda.is_available() else 1
    parser.add_argument(
        "--jobs", type=int, default=several, help="processes that share ops and dtypes (here by default %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns 0 where every row passes, else 1; 2 where an option does not fit."""
    arguments, parser = list(sys.argv[1:] if argv is None else argv), _parser()
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: there must be one process at least")
    if not registry.TRITON_INSTALLED:
        print("triton is not installed: there is no kernel to verify (pip install triton)", file=sys.stderr)
        return 1
    if not (torch.cuda.is_available() or registry.TRITON_INTERPRET):
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "transfusion.kernels.verify", *arguments]
        sys.stdout.flush()
        # in place of this process, so that whoever ends it ends the checks
        os.execve(sys.executable, command, environment)
    if options.junit:  # before the checks: they take minutes
        _check_report(parser, Path(options.junit))
    try:
        rows = _printed(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    if options.junit:
        write_junit(rows, Path(options.junit))
    failed = sum(not row.passed for row in rows)
    print(f"\n{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _printed(options: argparse.Namespace) -> list[Row]:
    """Every row, printed as it comes under the header."""
    seed = random.randrange(2**32) if options.seed is None else options.seed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(header(device, seed))
    print(_COLUMNS)
    rows = []
    for row in verify(device, options.op, seed, options.jobs):
        rows.append(row)
        print(format_row(row), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
