"""Times the launches of attention on this GPU, each after its check, and writes the fastest into the launch table.

    python -m transfusion.kernels.tune                                # 16 bits, head dims 64 and 128, every stage
    python -m transfusion.kernels.tune --stage forward --head-dim 128 --seconds 120

Candidates are compiled and checked by several processes, the ones nearest to the present launch first; then they are
timed one by one. What does not compile (too much shared memory), misses its bound or does not end is never timed. Every
figure is a line of `--rows`; the table keeps the choice. A GPU without a table gets one. Nothing is tuned at run time.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from transfusion.kernels import tuning
from transfusion.kernels.attention import check
from transfusion.kernels.attention.op import transfusion_attention
from transfusion.kernels.device_clock import queued
from transfusion.kernels.interval_mask import IntervalMask
from transfusion.kernels.testing import in_a_line, is_lost
from transfusion.kernels.tuning import SPECIALISED, Launch

STAGES = ("forward", "backward_query", "backward_key", "decode")
GRACE_SECONDS = 60.0  # at most, for checks that are under way when no more are begun
RESULTS = {"forward": ("out", "lse"), "decode": ("out", "lse"), "backward_query": ("dq",), "backward_key": ("dk", "dv")}


class Trial(NamedTuple):
    """One launch tried: its time in milliseconds (forward, or forward and backward), or why it has none."""

    stage: str
    dtype: str
    head_dim: int
    launch: Launch
    milliseconds: float | None
    reason: str = ""


def candidates(stage: str, head_dim: int, current: Launch, specialised: Sequence[Launch] = ()) -> list[Launch]:
    """Tiles, warps and stages worth a try: the current ones, `specialised`, then by how little they differ."""
    sides: tuple[Sequence[int], Sequence[int]] = ((64, 128), (32, 64, 128))
    if stage == "decode":
        sides = ((16,), (32, 64, 128, 256))
    elif stage == "backward_key":
        sides = ((32, 64, 128), (64, 128))
    tried = [Launch(*row) for row in product(*sides, (4, 8), (2, 3, 4)) if row[0] * row[1] * head_dim <= 2**21]

    def distance(launch: Launch) -> float:
        return sum(abs(math.log2(its / mine)) for its, mine in zip(launch, current, strict=True))

    first = [current, *(launch for launch in specialised if launch != current)]
    return [*first, *sorted((launch for launch in tried if launch != current), key=distance)]


def specialised_launches(stage: str, dtype: torch.dtype, head_dim: int) -> Sequence[Launch]:
    """The warp-specialised ones that this GPU can run."""
    fits = tuning.architecture(torch.device("cuda")) == "sm_90" and dtype.itemsize == 2
    return SPECIALISED.get(stage, {}).get(tuning.padded_head_dim(head_dim), ()) if fits else ()


def packed_mask(rows: int, length: int) -> IntervalMask:
    """Captions of 24 tokens with images of 256, three to one text of 512, as training packs them; on the GPU."""
    documents: list[int] = []
    images: list[tuple[int, int]] = []
    start = 0
    while start < length:
        text = len(documents) % 4 == 3
        size = min(512 if text else 24 + 258, length - start)
        if not text and size > 26:
            images.append((start + 25, min(start + 281, start + size)))
        documents.append(size)
        start += size
    return IntervalMask.stack([IntervalMask.from_spans(length, images, documents)] * rows).to("cuda")


def make_call(stage: str, dtype: torch.dtype, head_dim: int) -> Callable[[], Any]:
    """What is timed: 4 packed rows of 4096 tokens with 2048 / head_dim heads, then a causal one of 2048, half as many
    pairs; or one token over 16 caches of 16k."""
    heads = max(2048 // head_dim, 1)
    if stage == "decode":
        mask = IntervalMask.continuation(IntervalMask.causal(1, "cuda"), torch.full((16,), 16000, device="cuda"), 16384)
        q, k, v = (torch.randn(16, h, n, head_dim, device="cuda", dtype=dtype) for h, n in _cache_sizes(heads))
        return lambda: transfusion_attention(q, k, v, mask, impl="triton")
    calls = []
    for mask in (packed_mask(4, 4096), IntervalMask.causal(2048, "cuda")):
        shape = (mask.batch_size, heads, mask.num_queries, head_dim)
        q, k, v, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
        calls.append(partial(_attend, stage, q, k, v, mask, grad))
    return lambda: [call() for call in calls]


def _attend(stage: str, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, grad: Tensor) -> Any:
    if stage == "forward":
        return transfusion_attention(q, k, v, mask, impl="triton")
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    return torch.autograd.grad(transfusion_attention(q, k, v, mask, impl="triton"), (q, k, v), grad)


def _cache_sizes(heads: int) -> tuple[tuple[int, int], ...]:
    return (heads, 1), (max(heads // 4, 1), 16384), (max(heads // 4, 1), 16384)


def passes(stage: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the stage's results keep their bounds on a packed row, or over a cache.

    The forward is judged twice: with keys split over programs, and in so large a batch that they are not.
    """
    mask, device = packed_mask(1, 1000), torch.device("cuda")
    if stage == "decode":
        mask = IntervalMask.continuation(IntervalMask.causal(1, "cuda"), torch.tensor([0, 700], device="cuda"), 1000)
    shapes: list[dict[str, Any]] = [{"mask": mask, "heads": (4, 2), "batch": mask.batch_size}]
    if stage == "forward":
        shapes.append(check.unsplit(device))
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    cases = [
        check.make_case(
            dtype=dtype, generator=generator, head_dim=head_dim, **shape | {"mask": shape["mask"].to(device)}
        )
        for shape in shapes
    ]
    verdicts = [check.verdicts(case, check.run(case, "triton")) for case in cases]
    return all(each[name].passed for each in verdicts for name in RESULTS[stage])


def median_milliseconds(call: Callable[[], Any]) -> float:
    """Median time on the device: calls queue up behind a sleep of it, so that the host's time is not in theirs.

    What is timed reads more than the L2 cache holds.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    samples = [seconds for _ in range(8) for seconds in queued([call] * 8, host)]
    return 1e3 * statistics.median(samples)


@contextmanager
def installed(stage: str, dtype: torch.dtype, head_dim: int, launch: Launch) -> Iterator[None]:
    """The table of this process holds `launch` for so long."""
    table = tuning.architecture(torch.device("cuda"))
    tuning.add_table(table)
    current = tuning.launch("attention", stage, table, dtype, head_dim)
    tuning.set_launch("attention", stage, table, dtype, head_dim, launch)
    try:
        yield
    finally:
        tuning.set_launch("attention", stage, table, dtype, head_dim, current)


class FaultError(RuntimeError):
    """A launch after which its process can use the GPU no more: every later call there would fail like it."""


def why_not(stage: str, dtype: torch.dtype, head_dim: int, launch: Launch) -> str:
    """Why a candidate is not timed, or nothing. Leaves what will be timed compiled, in Triton's cache on the disk."""
    with installed(stage, dtype, head_dim, launch):
        try:
            if not passes(stage, dtype, head_dim):
                return "misses its bound"
            make_call(stage, dtype, head_dim)()
            torch.cuda.synchronize()
        except Exception as error:  # a compiler's, a launch's: the candidate is out, and the next is tried
            if is_lost("cuda"):
                raise FaultError(in_a_line(error)) from None
            return in_a_line(error)
    return ""


class Checkers:
    """So many workers of `make_pool` that check candidates.

    Where a launch hangs, faults or ends its process, all are made anew. What fell with it is checked again, alone, for
    it may have been another's doing.
    """

    def __init__(self, jobs: int, make_pool: Callable[[int], Executor]) -> None:
        self.jobs, self.make_pool = jobs, make_pool

    def __enter__(self) -> "Checkers":
        self.pool = self.make_pool(self.jobs)
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def reasons(self, ask: Callable[[Launch], str], launches: Sequence[Launch], seconds: float) -> list[str]:
        """`ask` of each launch within so many seconds, or a note that there was no time for it or that it hangs."""
        stop, grace = time.monotonic() + seconds, min(GRACE_SECONDS, seconds / 4)
        self.ask, self.launches, self.end = ask, launches, stop - grace
        self.answers = ["no time was left to check it"] * len(launches)
        self.left, self.alone, self.running = deque(range(len(launches))), set[int](), dict[Future[str], int]()
        self.broken = False
        while True:
            if self.broken and not self.running:
                self._renew()
            self._submit()
            left = max(stop - time.monotonic(), 0.0)
            done, _ = wait(self.running, min(grace, left) if self.broken else left, FIRST_COMPLETED)
            for future in done:
                self._settle(future)
            if self.broken and not done:  # what still runs beside a broken process is not waited for: it may hang
                for number in self.running.values():
                    self._again(number, "its check does not end")
                self.running.clear()
            elif not done:
                break
        for number in self.running.values():
            self.answers[number] = "its check does not end"
        if self.running:
            self._renew()
        return self.answers

    def _submit(self) -> None:
        while self.left and not self.broken and time.monotonic() < self.end:
            number = self.left[0]
            if len(self.running) >= (1 if number in self.alone else self.jobs):
                return
            try:
                future = self.pool.submit(self.ask, self.launches[number])
            except BrokenExecutor:  # since the last look at it
                self.broken = True
            else:
                self.running[future] = self.left.popleft()

    def _settle(self, future: Future[str]) -> None:
        number = self.running.pop(future)
        try:
            self.answers[number] = future.result()
        except (FaultError, BrokenExecutor) as error:
            self.broken = True
            self._again(number, str(error))

    def _again(self, number: int, answer: str) -> None:
        """Asks once more, alone; of one that was alone, `answer` is the answer."""
        if number in self.alone:
            self.answers[number] = answer
        else:
            self.alone.add(number)
            self.left.append(number)

    def _renew(self) -> None:
        self.pool.shutdown(wait=False)
        for process in multiprocessing.active_children():
            process.kill()
        self.pool, self.broken = self.make_pool(self.jobs), False


def tune(
    stage: str, dtype: torch.dtype, head_dim: int, until: float, checkers: Checkers | None = None
) -> Iterator[Trial]:
    """A trial of each candidate, until the clock says so; checkers are done, or stopped, before the first is timed."""
    if time.monotonic() > until:
        return
    current = tuning.launch("attention", stage, tuning.table_name(torch.device("cuda")), dtype, head_dim)
    launches = candidates(stage, head_dim, current, specialised_launches(stage, dtype, head_dim))
    ask, name = partial(why_not, stage, dtype, head_dim), str(dtype).removeprefix("torch.")
    reasons: Iterable[str] = map(ask, launches)
    if checkers is not None:
        reasons = checkers.reasons(ask, launches, 0.75 * (until - time.monotonic()))
    for launch, reason in zip(launches, reasons, strict=True):
        if time.monotonic() > until:
            return
        milliseconds = None
        if not reason:
            with installed(stage, dtype, head_dim, launch):
                milliseconds = median_milliseconds(make_call(stage, dtype, head_dim))
        yield Trial(stage, name, head_dim, launch, milliseconds, reason)


def fastest(trials: Sequence[Trial]) -> Launch | None:
    """The launch of the smallest time, or None where nothing was timed."""
    timed = [trial for trial in trials if trial.milliseconds is not None]
    return min(timed, key=lambda trial: trial.milliseconds or 0.0).launch if timed else None


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes what is asked for, prints and keeps each figure, writes the table. -> 0."""
    parser = argparse.ArgumentParser(prog="tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be repeated; default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--head-dim", action="append", type=int, help="may be repeated; default: 64 and 128")
    parser.add_argument("--seconds", type=float, default=480.0, help="stop after so long; what was found is kept")
    parser.add_argument("--rows", type=Path, help="append a JSON line for each trial")
    jobs = min(os.cpu_count() or 1, 12)
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="processes that compile and check (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    _check_options(parser, options)
    if not torch.cuda.is_available():
        print("tuning needs a GPU, and torch finds none", file=sys.stderr)
        return 1
    dtype, table = getattr(torch, options.dtype), tuning.architecture(torch.device("cuda"))
    tuning.add_table(table)
    plan = list(product(options.head_dim or (128, 64), options.stage or STAGES))
    spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    pools = partial(ProcessPoolExecutor, mp_context=spawn)
    with Checkers(options.jobs, pools) if options.jobs > 1 else nullcontext() as checkers:
        _tune_all(plan, dtype, options, checkers)
    return 0


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command, with status 2, where an option does not fit."""
    for head_dim in options.head_dim or ():
        if not 16 <= head_dim <= 256:
            parser.error(f"--head-dim {head_dim}: the kernels take 16 to 256")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: there must be one process at least")
    if not options.seconds >= 0:
        parser.error(f"--seconds {options.seconds:g}: time does not run backwards")
    if not os.access(tuning.FOLDER, os.W_OK):
        parser.error(f"{tuning.FOLDER}, where the table goes, cannot be written to; install the package as your own")
    if options.rows:
        try:
            options.rows.open("a").close()
        except OSError as error:
            parser.error(f"--rows {options.rows}: {error.strerror}; name a file in a folder that can be written to")


def _tune_all(plan: Sequence[tuple[int, str]], dtype: torch.dtype, options: Any, checkers: Checkers | None) -> None:
    table = tuning.architecture(torch.device("cuda"))
    end = time.monotonic() + options.seconds
    for index, (head_dim, stage) in enumerate(plan):
        share = (end - time.monotonic()) / (len(plan) - index)  # what is left is divided anew
        trials = []
        try:
            for trial in tune(stage, dtype, head_dim, time.monotonic() + share, checkers):
                trials.append(trial)
                print(_line(trial), flush=True)
                if options.rows:
                    with open(options.rows, "a", encoding="utf-8") as file:
                        record = trial._asdict() | {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
                        file.write(json.dumps(record) + "\n")
        finally:  # where it is stopped in the middle, what was timed till then counts
            chosen = fastest(trials)
            if chosen is not None:
                tuning.set_launch("attention", stage, table, dtype, head_dim, chosen)
                print(f"{stage} {options.dtype} {head_dim}: {tuple(chosen)} -> {tuning.save(table)}", flush=True)


def _line(trial: Trial) -> str:
    figure = trial.reason if trial.milliseconds is None else f"{trial.milliseconds:.4f} ms"
    return f"{trial.stage:15} {trial.dtype} {trial.head_dim:4} {tuple(trial.launch)!s:20} {figure}"


if __name__ == "__main__":
    sys.exit(main())
