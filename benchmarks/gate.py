"""No time is taken of a kernel whose result is wrong: the check of one baseline on the very call that is timed.

The gradient from above is zero but for a slice: one key head with the query heads that read it, one run of queries, one
row or, where rows have few queries, all of them. So out and dq of the slice, and dk and dv of the whole key head,
follow from the slice alone, and a float64 gold of it fits in memory at any length.
"""

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapter import Baseline
from transfusion.kernels import IntervalMask
from transfusion.kernels.attention.check import Case, eager_orders, formula
from transfusion.kernels.testing import Verdict, judge

_QUERIES = 512
_ORDERS = 16  # of 64 that `verify` takes: here each is as long as a benchmark's rows


def verdicts(
    baseline: Baseline, prepared: Any, mask: IntervalMask, leaves: list[Tensor], backward: bool, seed: int
) -> dict[str, Verdict]:
    """out, and with `backward` dq, dk, dv of `baseline` under `mask`, on a slice that `seed` chooses."""
    small, part, keys = _slice(mask, leaves, random.Random(seed))
    out = baseline(prepared, *leaves)
    if not out.isfinite().all():
        return {"finite": Verdict(float("inf"), 0.0)}
    results = [out.detach()[part]]
    if backward:
        above = torch.zeros_like(out)
        above[part] = small.grad_out
        dq, dk, dv = torch.autograd.grad(out, leaves, above)
        results += [dq[part], dk[keys], dv[keys]]
    gold, eager = formula(small, torch.float64, torch.float64), eager_orders(small, _ORDERS)
    names = {"out": 0, "dq": 2, "dk": 3, "dv": 4} if backward else {"out": 0}
    pairs = zip(names.items(), results, strict=True)
    return {name: judge(result, eager[place], gold[place]) for (name, place), result in pairs}


def _slice(
    mask: IntervalMask, leaves: list[Tensor], rng: random.Random
) -> tuple[Case, tuple[slice, ...], tuple[slice, ...]]:
    """The slice as a case of its own; its place in q and out; its place in k and v."""
    q, k, v = (leaf.detach() for leaf in leaves)
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    head, row = rng.randrange(k.shape[1]), rng.randrange(batch)
    first = rng.randrange(max(1, queries - _QUERIES + 1))
    rows = slice(None) if queries < 64 else slice(row, row + 1)
    part = (rows, slice(head * group, (head + 1) * group), slice(first, first + _QUERIES))
    keys = (rows, slice(head, head + 1))
    vectors = [t.expand(batch, -1)[rows].long() - first for t in (mask.query_start, mask.query_end)]
    piece = q[part]
    small = IntervalMask(*vectors, piece.shape[2])
    grad_lse = torch.zeros(piece.shape[:3], device=q.device)
    return Case(piece, k[keys], v[keys], small, torch.randn_like(piece), grad_lse), part, keys


def failures(verdicts: dict[str, Verdict]) -> str:
    """What is wrong, in words; nothing where all passed."""
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.passed}
    return ", ".join(f"error of {name} {v.error:.2e} above its bound {v.bound:.2e}" for name, v in wrong.items())
