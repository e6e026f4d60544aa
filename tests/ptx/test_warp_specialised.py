"""Warp-specialised attention for sm_90, which `tune` may choose: exact whatever the order of events, and it ends."""

import copy
import math
import os
import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from playing import playing
from torch import Tensor

from transfusion.kernels import IntervalMask, transfusion_attention, tuning
from transfusion.kernels.attention import check
from transfusion.kernels.attention.kernel import (
    specialised_blocks,
    warp_specialised,
    warp_specialised_key,
    warp_specialised_query,
)
from transfusion.kernels.testing import judge, random_layout
from transfusion.kernels.tuning import SPECIALISED, Launch

MODULES = {"forward": warp_specialised, "backward_query": warp_specialised_query, "backward_key": warp_specialised_key}
RESULTS = {"forward": ("out", "lse"), "backward_query": ("dq",), "backward_key": ("dk", "dv")}
EVERY = os.environ.get("PTX_ALL") == "1"


def launches(stage: str) -> list[tuple[int, Launch]]:
    return [(head_dim, launch) for head_dim, each in SPECIALISED[stage].items() for launch in each]


# To compile them all takes minutes: one of each kernel, unless the environment asks for every one.
CHOSEN = [(stage, each) for stage in MODULES for each in (launches(stage) if EVERY else [None])]


@pytest.fixture(autouse=True)
def few_programs(seed: int) -> Iterator[None]:
    """Each takes several blocks."""
    with playing(90, seed, processors=2):
        yield


def make_case(mask: IntervalMask, seed: int, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> check.Case:
    return check.make_case(mask, dtype, torch.Generator().manual_seed(seed), **{"head_dim": 64} | shape)


def run(stage: str, case: check.Case, launch: Launch, module: ModuleType | None = None) -> tuple[Tensor, ...]:
    """The stage's results, over NaN; a gradient's from the formula's out and lse."""
    module = module or MODULES[stage]
    q, k, v, mask, grad_out, grad_lse = case
    scale = q.shape[3] ** -0.5
    block_q, block_k = launch[:2]
    if stage == "forward":
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
        tiles = mask.query_tiles(block_q, block_k)
        module.forward(q, k, v, mask.intervals, tiles, math.log2(math.e) * scale, launch, out, lse)
        return out, lse
    out, lse, *_ = check.formula(case, torch.float64, torch.float64)
    delta = (out * grad_out).sum(-1).float() - grad_lse
    inputs = (q, k, v, grad_out, (lse * math.log2(math.e)).float(), delta)
    if stage == "backward_query":
        dq = torch.full_like(q, torch.nan)
        module.backward_query(*inputs, dq, mask.intervals, mask.query_tiles(block_q, block_k), scale, launch)
        return (dq,)
    dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    module.backward_key(*inputs, dk, dv, mask.intervals, mask.key_tiles(block_k, block_q), scale, launch)
    return dk, dv


def judged(stage: str, case: check.Case, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results, which keep their bounds."""
    gold, eager = check.formula(case, torch.float64, torch.float64), check.eager_orders(case, 16)
    for name, result in zip(RESULTS[stage], results, strict=True):
        at = check.RESULTS.index(name)
        verdict = judge(result, eager[at], gold[at])
        assert verdict.passed, (name, verdict)
    return results


@pytest.mark.parametrize(("stage", "launch"), CHOSEN, ids=str)
def test_launches_that_tuning_tries(stage: str, launch: Any, seed: int) -> None:
    """Rows that differ, of an odd number of keys; grouped heads; masked and full tiles; padded lanes."""
    rng = random.Random(seed)
    head_dim, launch = launch or rng.choice(launches(stage))
    mask = IntervalMask.stack([random_layout(rng, 401).mask() for _ in range(2)])
    dtype, size = rng.choice([torch.bfloat16, torch.float16]), rng.choice([head_dim, head_dim - 24])
    print(launch, dtype, size)
    case = make_case(mask, seed, dtype, head_dim=size, heads=(4, 2))
    judged(stage, case, run(stage, case, launch))


@pytest.mark.parametrize("stage", MODULES)
def test_random_intervals(stage: str, seed: int) -> None:
    """Queries that see nothing, blocks without a tile, more queries than keys and fewer."""
    launch = SPECIALISED[stage][64][0]
    sizes = (
        ((300, 70), (129, 331)) if EVERY else (random.Random(seed).choice([(1, 1), (1, 65), (300, 70), (129, 331)]),)
    )
    for queries, keys in sizes:
        start, end = torch.randint(-3, queries + 3, (2, 2, keys), generator=torch.Generator().manual_seed(seed))
        case = make_case(IntervalMask(start, end, queries), seed, batch=2)
        judged(stage, case, run(stage, case, launch))
        nothing = IntervalMask(torch.full((2, keys), queries), torch.zeros(2, keys, dtype=torch.int64), queries)
        results = run(stage, make_case(nothing, seed, batch=2), launch)
        assert not results[0].any() and (stage != "forward" or (results[1] == -torch.inf).all())


@pytest.mark.parametrize("stage", MODULES)
def test_strides_and_addresses(stage: str, seed: int) -> None:
    """(B, N, H, D) views are read as they are; what the accelerator cannot describe is copied. No input changes."""
    launch = SPECIALISED[stage][64][0]
    case = make_case(random_layout(random.Random(seed), 150).mask(), seed, heads=(2, 2), batch=2)
    expected = run(stage, case, launch)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
        lambda tensor: torch.nn.functional.pad(tensor, (0, 1))[..., :-1],
        lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor),  # an odd address
    ]
    for index, change in enumerate(changes):
        q, k, v, grad_out = (change(tensor) for tensor in (*case[:3], case.grad_out))
        assert (specialised_blocks.describe(q, 128).base is q) == (index == 0)
        found = run(stage, check.Case(q, k, v, case.mask, grad_out, case.grad_lse), launch)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, (q, k, v, grad_out), (*case[:3], case.grad_out)))


@pytest.mark.parametrize("stage", MODULES)
def test_the_order_of_events_does_not_show(stage: str, seed: int) -> None:
    """Each warp in an order of its own."""
    case = make_case(random_layout(random.Random(seed), 300).mask(), seed, heads=(2, 2))
    launch = SPECIALISED[stage][64][0]
    expected = run(stage, case, launch)
    with playing(90, seed, together=False, processors=2):
        assert all(map(torch.equal, run(stage, case, launch), expected))


def test_the_op_runs_what_the_table_says(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Forward and backward, by the public function; a negative scale too."""
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    for stage in MODULES:
        tuning.set_launch("attention", stage, "sm_90", torch.bfloat16, 64, SPECIALISED[stage][64][0])
    mask = random_layout(random.Random(seed), 300).mask()
    case = make_case(mask, seed, heads=(4, 2), batch=2)
    with playing(90, seed, processors=2) as device:
        verdicts = check.verdicts(case, check.run(case, "triton"))
        assert all(verdict.passed for verdict in verdicts.values()), verdicts
        assert sum(name.startswith("specialised_") for name in device.launched) == 3
        q, k, v = case[:3]
        negative = transfusion_attention(q, k, v, mask, scale=-0.1, impl="triton")
        assert torch.equal(negative, transfusion_attention(-q, k, v, mask, scale=0.1, impl="triton"))
