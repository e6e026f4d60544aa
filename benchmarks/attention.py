"""Suite "attention": every case under every baseline, each checked before it is timed.

FLOPs are 4·area·H·D forward and 2.5 times that backward, with the area of the mask that the baseline computes. Bytes
are those of q, out, the keys and values that some query sees, and backward their gradients: each once.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.adapter import Baseline
from benchmarks.baselines import BASELINES
from benchmarks.cases import ATTENTION, DEVICE, DTYPE, AttentionCase
from benchmarks.clock import (
    Effort,
    Times,
    copies_past_cache,
    copy_bandwidth,
    device_time,
    matmul_rate,
    peak_memory,
    wall_time,
)
from benchmarks.gate import failures, verdicts
from transfusion.kernels import IntervalMask

SUITE = "attention"


def pairs() -> list[tuple[str, str]]:
    """(case, baseline) of the suite, most important first."""
    return [(case, baseline) for case in ATTENTION for baseline in BASELINES]


def inputs(case: AttentionCase, copies: int | None = None) -> list[list[Tensor]]:
    """Sets of (q, k, v) to rotate, past the cache unless `copies` says how many; leaves where there is a backward."""

    def one() -> list[Tensor]:
        shapes = [(case.heads, case.queries), (case.kv_heads, case.keys), (case.kv_heads, case.keys)]
        return [
            torch.randn(case.batch, *s, case.head_dim, device=DEVICE, dtype=DTYPE, requires_grad=case.backward)
            for s in shapes
        ]

    first = one()
    return [first, *(one() for _ in range((copies or copies_past_cache(first)) - 1))]


def fresh(host: IntervalMask) -> IntervalMask:
    """The mask as a new batch brings it: on this device, with nothing derived yet."""
    return (
        host.to(DEVICE, non_blocking=True)
        if DEVICE == "cuda"
        else IntervalMask(host.query_start, host.query_end, host.num_queries)
    )


def run(case_name: str, baseline_name: str, effort: Effort) -> Iterator[rows.Row]:
    """The rows of one case under one baseline: timed, or one that says why it is not."""
    case, baseline = ATTENTION[case_name], BASELINES[baseline_name]

    def row(measure: str, status: str, **values: Any) -> rows.Row:
        return rows.row(SUITE, case_name, baseline_name, measure, status, **values)

    reason = baseline.why_not(case)
    if reason:
        yield row(baseline.measures[0], "skipped", reason=reason)
        return
    torch._dynamo.reset()  # else a library that compiles for each shape soon meets its limit, and falls back silently
    pair = (SUITE, case_name, baseline_name)
    measures = [each for each in baseline.measures if each != "backward" or case.backward]
    yield from rows.explained(_measured(case, baseline, effort, row), pair, measures, baseline.ours)


def _measured(case: AttentionCase, baseline: Baseline, effort: Effort, row: Any) -> Iterator[rows.Row]:
    sets, host = inputs(case), case.mask()
    if DEVICE == "cuda":  # once: allocating pinned memory may wait for the device, under the clock
        host.intervals = host.intervals.pin_memory()
    mask = baseline.mask(case, fresh(host))
    conditions: rows.Row = {"shape": asdict(case), "dtype": str(DTYPE).removeprefix("torch."), "rotated": len(sets)}
    conditions["same_mask"] = mask.area().equal(fresh(host).area())
    start = time.perf_counter()
    prepared = baseline.prepare(mask, *sets[0])
    if "forward" in baseline.measures:
        backward = case.backward
        checked = verdicts(baseline, prepared, mask, sets[0], backward, seed := random.randrange(2**31))
        conditions |= {"first_call": time.perf_counter() - start, "gate": checked, "gate_seed": seed}
        wrong = failures(checked)
        if wrong:
            yield row("forward", "failed", reason=wrong, **conditions)
            return
        yield row("forward", "ok", **conditions, **_forward(case, baseline, prepared, mask, sets, effort))
        if backward:
            yield row("backward", "ok", **conditions, **_backward(case, baseline, prepared, mask, sets, effort))
    if "prepare" in baseline.measures:
        yield row("prepare", "ok", **conditions, **_prepare(case, baseline, host, sets[0], effort))


def _forward(
    case: AttentionCase, baseline: Baseline, prepared: Any, mask: IntervalMask, sets: list[list[Tensor]], effort: Effort
) -> rows.Row:
    with peak_memory() as peak:
        baseline(prepared, *sets[0])
    times = device_time(lambda number: baseline(prepared, *sets[number % len(sets)]), effort)
    return _derived(case, mask, times, 1.0) | {"peak_bytes": (peak or [None])[0]}


def _backward(
    case: AttentionCase, baseline: Baseline, prepared: Any, mask: IntervalMask, sets: list[list[Tensor]], effort: Effort
) -> rows.Row:
    outs = [baseline(prepared, *leaves) for leaves in sets]
    above = torch.randn_like(outs[0])

    def step(number: int) -> Any:
        place = number % len(sets)
        return torch.autograd.grad(outs[place], sets[place], above, retain_graph=True)

    with peak_memory() as peak:
        step(0)
    return _derived(case, mask, device_time(step, effort), 2.5) | {"peak_bytes": (peak or [None])[0]}


def _prepare(
    case: AttentionCase, baseline: Baseline, host: IntervalMask, leaves: list[Tensor], effort: Effort
) -> rows.Row:
    def step(number: int) -> Any:
        return baseline.prepare(fresh(host), *leaves)

    with peak_memory() as peak:
        step(0)
    times = device_time(step, effort)
    wall = wall_time(step, effort).p50 if DEVICE == "cuda" else times.p50
    return times._asdict() | {"wall_p50": wall, "tokens": case.batch * case.queries, "peak_bytes": (peak or [None])[0]}


def _derived(case: AttentionCase, mask: IntervalMask, times: Times, factor: float) -> rows.Row:
    """Rates, and the share of the roofline: the longer of the times that FLOPs and bytes need at the ceilings."""
    broadcast = case.batch if mask.batch_size == 1 else 1
    area = int(mask.area().sum()) * broadcast
    seen = int((mask.query_end > mask.query_start).sum()) * broadcast
    flops = factor * 4 * area * case.heads * case.head_dim
    keys, queries = seen * case.kv_heads, case.batch * case.queries * case.heads
    # forward: q, k, v in, out; backward: those and the gradient in, the gradients of q, k, v out
    numbers = case.head_dim * (2 * keys + 2 * queries if factor == 1 else 4 * keys + 4 * queries)
    moved = numbers * DTYPE.itemsize
    compute, memory = flops / matmul_rate(), moved / copy_bandwidth()
    return {
        **times._asdict(),
        "area": area,
        "tflops": flops / times.p50 / 1e12,
        "ceiling_tflops": matmul_rate() / 1e12,
        "gigabytes_per_second": moved / times.p50 / 1e9,
        "ceiling_gigabytes_per_second": copy_bandwidth() / 1e9,
        "bound": "compute" if compute > memory else "memory",
        "share": max(compute, memory) / times.p50,
    }
