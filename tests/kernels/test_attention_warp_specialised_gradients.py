"""The warp-specialised gradients on the machine of `warp_machine.py`: exact in every order of events, and they end."""

import copy
import random
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from warp_machine import WarpMachine, changed
from warp_memory import Fault

from transfusion.kernels import IntervalMask, tuning
from transfusion.kernels.attention import check, reference
from transfusion.kernels.attention.kernel import specialised_blocks, warp_specialised_key, warp_specialised_query
from transfusion.kernels.attention.plan import plan_backward
from transfusion.kernels.testing import LAYOUTS, judge, random_layout
from transfusion.kernels.tuning import SPECIALISED, Launch

QUERY, KEY = warp_specialised_query.specialised_query_kernel, warp_specialised_key.specialised_key_kernel
# A short row has several tiles of so few keys, or queries.
SMALL_QUERY, SMALL_KEY = Launch(128, 32, 12, 2), Launch(32, 128, 12, 2)


class Given(NamedTuple):
    """What the kernels begin with: a case, its lse as a forward rounds it, and delta with the out of a forward."""

    case: check.Case
    lse: Tensor
    delta: Tensor


def on_machine(order: int) -> None:
    """The kernels run in that order of events."""
    warp_specialised_query.specialised_query_kernel = WarpMachine(order)(QUERY)
    warp_specialised_key.specialised_key_kernel = WarpMachine(order)(KEY)


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels run on the machine, by few programs, so that each takes several blocks. A fresh order of events."""
    seed = random.randrange(10**6)
    print("seed", seed)  # shown where a test fails
    monkeypatch.setattr(warp_specialised_query, "specialised_query_kernel", QUERY)
    monkeypatch.setattr(warp_specialised_key, "specialised_key_kernel", KEY)
    monkeypatch.setattr(tuning, "processors", lambda device: 3)
    on_machine(seed)
    return seed


def make(mask: IntervalMask, seed: int, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Given:
    case = check.make_case(mask, dtype, torch.Generator().manual_seed(seed), **{"head_dim": 64} | shape)
    q, k, v = (tensor.double() for tensor in case[:3])
    out, lse = reference.forward(q, k, v, mask.intervals, q.shape[3] ** -0.5, torch.float64)
    delta = (out.to(dtype).float() * case.grad_out.float()).sum(-1) - case.grad_lse
    return Given(case, lse.float(), delta)


def run(
    given: Given,
    query: Launch = SMALL_QUERY,
    key: Launch = SMALL_KEY,
    modules: tuple[ModuleType, ModuleType] = (warp_specialised_query, warp_specialised_key),
) -> list[Tensor]:
    """dq, dk and dv, over NaN."""
    (q, k, v, mask, grad_out, _), lse, delta = given
    dq, dk, dv = (torch.full_like(tensor, torch.nan) for tensor in (q, k, v))
    inputs, scale = (q, k, v, grad_out, lse, delta), q.shape[3] ** -0.5
    tiles = mask.query_tiles(query.block_q, query.block_k), mask.key_tiles(key.block_k, key.block_q)
    modules[0].backward_query(*inputs, dq, mask.intervals, tiles[0], scale, query)
    modules[1].backward_key(*inputs, dk, dv, mask.intervals, tiles[1], scale, key)
    return [dq, dk, dv]


def failures(given: Given, results: list[Tensor]) -> list[Any]:
    """What misses its bound."""
    gold, eager = check.formula(given.case, torch.float64, torch.float64)[2:], check.eager_orders(given.case, 16)[2:]
    judged = {name: judge(*each) for name, *each in zip(check.RESULTS[2:], results, eager, gold, strict=True)}
    return [(name, verdict) for name, verdict in judged.items() if not verdict.passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, dtype: torch.dtype, seed: int) -> None:
    given = make(LAYOUTS[name].mask(), seed, dtype)
    assert not failures(given, run(given))


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_random_layouts(head_dim: int, heads: tuple[int, int], seed: int) -> None:
    """Rows that differ, of an odd length; masked and full tiles in many runs; padded lanes."""
    rng = random.Random(seed)
    mask = IntervalMask.stack([random_layout(rng, 201).mask() for _ in range(2)])
    given, stages = make(mask, seed, head_dim=head_dim, heads=heads), rng.choice([2, 3, 4])
    results = run(given, SMALL_QUERY._replace(num_stages=stages), SMALL_KEY._replace(num_stages=stages - 1))
    assert not failures(given, results)


@pytest.mark.parametrize("head_dim", SPECIALISED["backward_query"])
def test_launches_that_tuning_tries(head_dim: int, seed: int) -> None:
    mask = IntervalMask.from_spans(400, images=[(20, 276), (300, 360)], documents=[290, 110])
    given = make(mask, seed, head_dim=head_dim)
    for launches in zip(SPECIALISED["backward_query"][head_dim], SPECIALISED["backward_key"][head_dim], strict=True):
        assert not failures(given, run(given, *launches)), launches


@pytest.mark.parametrize("tiles", range(1, 8))
def test_lines_of_every_number_of_tiles(tiles: int, seed: int) -> None:
    """Steps over keys go in pairs: with one left over or not, all masked, all full, or full after masked."""
    rows = 32 * tiles
    for mask in (IntervalMask.causal(rows), IntervalMask.full(rows, rows), IntervalMask.full(129, rows - 3)):
        given = make(mask, seed)
        assert not failures(given, run(given))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (33, 7), (300, 200), (129, 31)])
def test_random_intervals(queries: int, keys: int, seed: int) -> None:
    """Queries that see nothing, blocks without a tile, more queries than keys and fewer."""
    start, end = torch.randint(-3, queries + 3, (2, 2, keys), generator=torch.Generator().manual_seed(seed))
    given = make(IntervalMask(start, end, queries), seed, batch=2)
    assert not failures(given, run(given))
    nothing = IntervalMask(torch.full((1, keys), queries), torch.zeros(1, keys, dtype=torch.int64), queries)
    assert not any(grad.any() or grad.isnan().any() for grad in run(make(nothing, seed)))


def test_strides_and_addresses(seed: int) -> None:
    """(B, N, H, D) views are read as they are; what the accelerator cannot describe is copied. No input changes."""
    given = make(LAYOUTS["adjacent_images"].mask(), seed, heads=(2, 2), batch=2)
    expected = run(given)
    case, lse, delta = given

    def laid_out(tensor: Tensor, how: str) -> Tensor:
        if how == "BNHD":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "odd rows":
            return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)  # an odd address

    for how in ("BNHD", "odd rows", "odd address"):
        views = [laid_out(tensor, how) for tensor in (*case[:3], case.grad_out)]
        other = check.Case(*views[:3], case.mask, views[3], case.grad_lse)
        numbers = (laid_out(lse, how), laid_out(delta, how)) if how == "odd address" else (lse, delta)
        assert all(map(torch.equal, run(Given(other, *numbers)), expected)), how
        assert all(map(torch.equal, views, (*case[:3], case.grad_out)))
    for length in (5, 8):  # rows of numbers begin at multiples of 16 bytes
        numbers = torch.arange(6.0 * length).view(2, 3, length)
        described = specialised_blocks.describe_numbers(numbers, 64).base
        assert described.shape == (6, 8) and torch.equal(described[:, :length], numbers.view(6, length))
        assert (described.data_ptr() == numbers.data_ptr()) == (length == 8)


@pytest.mark.parametrize("order", range(3))
def test_the_order_of_events_does_not_show(order: int, seed: int) -> None:
    given = make(LAYOUTS["hidden_image"].mask(), 0, heads=(4, 2))
    results = run(given)
    on_machine(order)
    assert all(map(torch.equal, results, run(given)))


# ------------------------------------------------------------- the machine notices

QUERY_FREED = "mbarrier.arrive(bars.index(STAGES + n % STAGES))\n    return dq, next"
QUERY_LAST_FREED = "mbarrier.arrive(bars.index(STAGES + n % STAGES))\n    return dq\n"
QUERY_AWAITED = "dq, next_scores, next_dp = warpgroup_mma_wait(0, deps=[dq, next_scores, next_dp])\n    "
KEY_AWAITED = "dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])\n    "
KEY_FREED = "mbarrier.arrive(bars.index(STAGES + at))\n    return dk"
Changes = list[tuple[str, str]]
BROKEN: dict[str, Changes] = {
    "no fence": [("fence_async_shared()  # the copies signal what these instructions wrote", "pass")],
    "places are overwritten": [("mbarrier.wait(bars.index(STAGES + at), n // STAGES & 1 ^ 1)", "pass")],
    "owned tiles are overwritten": [("mbarrier.wait(block_bars.index(1), taken & 1 ^ 1)", "pass")],
    "one consumer frees a place for both": [("bars.index(STAGES + at), count=2", "bars.index(STAGES + at), count=1")],
    "one consumer frees owned tiles for both": [("block_bars.index(1), count=2", "block_bars.index(1), count=1")],
    "the parity is wrong": [("n // STAGES & 1 ^ 1", "n // STAGES & 1")],
    "too few bytes": [("4 * STREAMED * BLOCK_D + 8 * STREAMED", "4 * STREAMED * BLOCK_D")],
    "too few bytes owned": [("4 * OWNED * BLOCK_D", "2 * OWNED * BLOCK_D")],
}
BROKEN_QUERY: dict[str, Changes] = BROKEN | {
    "keys are read early": [("mbarrier.wait(bars.index(n % STAGES), n // STAGES & 1)", "pass")],
    "queries are read early": [("mbarrier.wait(block_bars.index(0), taken & 1)", "pass")],
    "a step uses products early": [(QUERY_AWAITED, QUERY_AWAITED.replace("(0", "(1"))],
    "the first scores are used early": [("wait(0, deps=[scores, dp])", "wait(1, deps=[scores, dp])")],
    "the last dq is used early": [("wait(0, deps=[_weighted", "wait(1, deps=[_weighted")],
    "keys are never freed": [(QUERY_FREED, "return dq, next")],
    "the last keys are never freed": [(QUERY_LAST_FREED, "return dq\n")],
    "keys are freed early": [
        (QUERY_AWAITED + QUERY_FREED, "FREED"),
        ("FREED", QUERY_FREED.partition("\n")[0] + "\n    " + QUERY_AWAITED + "return dq, next"),
    ],
    "queries are never freed": [("mbarrier.arrive(block_bars.index(1))", "pass")],
    "queries are freed early": [
        ("mbarrier.arrive(block_bars.index(1))", "pass"),
        ("pairs = (tile_count - 1) // 2", "pairs = (tile_count - 1) // 2\n    mbarrier.arrive(block_bars.index(1))"),
    ],
    "n is not counted on": [("n += tile_count", "n += tile_count - 1")],
}  # fmt: skip
BROKEN_KEY: dict[str, Changes] = BROKEN | {
    "queries are read early": [("mbarrier.wait(bars.index(at), n // STAGES & 1)", "pass")],
    "keys are read early": [("mbarrier.wait(block_bars.index(0), taken & 1)", "pass")],
    "scores are used early": [("wait(1, deps=[scores])", "wait(2, deps=[scores])")],
    "dp is used early": [("wait(1, deps=[dp])", "wait(2, deps=[dp])")],
    "dk is used early": [(KEY_AWAITED, KEY_AWAITED.replace("(0", "(1"))],
    "queries are never freed": [(KEY_FREED, "return dk")],
    "queries are freed early": [
        (KEY_AWAITED + KEY_FREED, "FREED"),
        ("FREED", KEY_FREED.partition("\n")[0] + "\n    " + KEY_AWAITED + "return dk"),
    ],
    "keys are never freed": [("mbarrier.arrive(block_bars.index(1))", "pass")],
    "keys are freed early": [
        ("mbarrier.arrive(block_bars.index(1))", "pass"),
        ("for _ in range(group):", "mbarrier.arrive(block_bars.index(1))\n            for _ in range(group):"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("side", "what"), [*(("query", what) for what in BROKEN_QUERY), *(("key", what) for what in BROKEN_KEY)]
)
def test_a_broken_kernel_is_noticed(side: str, what: str, tmp_path: Path) -> None:
    index, table = (0, BROKEN_QUERY) if side == "query" else (1, BROKEN_KEY)
    modules = [warp_specialised_query, warp_specialised_key]
    given = make(IntervalMask.causal(400), 0, heads=(2, 2))
    right = run(given)
    modules[index] = changed([specialised_blocks, modules[index]], table[what], tmp_path)
    name = f"specialised_{side}_kernel"
    kernel = getattr(modules[index], name)
    for order in range(20):
        setattr(modules[index], name, WarpMachine(order)(kernel))
        try:
            if not all(map(torch.equal, run(given, modules=tuple(modules)), right)):
                return
        except Fault:
            return
    pytest.fail(f"nobody noticed in 20 orders of events: {what}")


# ------------------------------------------------------------- in the op


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's table with warp-specialised gradients, in this test."""
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    for dtype in (torch.float16, torch.float32):
        tuning.set_launch("attention", "backward_query", "interpret", dtype, 64, SMALL_QUERY)
        tuning.set_launch("attention", "backward_key", "interpret", dtype, 64, SMALL_KEY)


def test_plan_takes_them_where_they_fit(table: None) -> None:
    """Elsewhere the plain kernel has the same tile, so that tiles of the mask serve both."""

    def plan(stage: str, dtype: torch.dtype, queries: int, keys: int, dim: int) -> Launch:
        return plan_backward(torch.device("cpu"), dtype, stage, queries, keys, dim)

    for stage, launch in (("query", SMALL_QUERY), ("key", SMALL_KEY)):
        assert plan(stage, torch.float16, 1, 1, 40) == plan(stage, torch.bfloat16, 512, 3, 64) == launch
        plain = Launch(*launch[:2], 8, 3)
        assert plan(stage, torch.float16, 512, 512, 60) == plan(stage, torch.float16, 512, 0, 64) == plain
        assert plan(stage, torch.float16, 0, 512, 64) == plan(stage, torch.float32, 512, 512, 64) == plain


@pytest.mark.parametrize("head_dim", [64, 60])
def test_the_op_runs_what_the_table_says(
    head_dim: int, table: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The shipped forward, these gradients, or the plain ones where rows are not multiples of 16 bytes."""
    launched: list[str] = []
    for module, name in ((warp_specialised_query, "backward_query"), (warp_specialised_key, "backward_key")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *call, function=function, name=name: (launched.append(name), function(*call))
        )
    mask = random_layout(random.Random(seed), 150).mask()
    case = check.make_case(mask, torch.float16, torch.Generator().manual_seed(seed), head_dim, (4, 2), 2)
    verdicts = check.verdicts(case, check.run(case, "triton"))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts
    assert launched == (["backward_key", "backward_query"] if head_dim == 64 else [])
