"""The warp-specialised forward on the machine of `warp_machine.py`: exact in every order of events, and it ends."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from warp_machine import WarpMachine, changed
from warp_memory import Fault

from transfusion.kernels import IntervalMask, transfusion_attention, tuning
from transfusion.kernels.attention import check
from transfusion.kernels.attention.kernel import specialised_blocks, warp_specialised
from transfusion.kernels.attention.plan import plan_forward
from transfusion.kernels.testing import LAYOUTS, judge, random_layout
from transfusion.kernels.tuning import SPECIALISED, Launch

KERNEL = warp_specialised.specialised_forward_kernel
SMALL = Launch(128, 32, 12, 2)  # a short row has several tiles of so few keys


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels run on the machine, by few programs, so that each takes several blocks. A fresh order of events."""
    seed = random.randrange(10**6)
    print("seed", seed)  # shown where a test fails
    monkeypatch.setattr(warp_specialised, "specialised_forward_kernel", WarpMachine(seed)(KERNEL))
    monkeypatch.setattr(tuning, "processors", lambda device: 3)
    return seed


def run(
    case: check.Case, launch: Launch, forward: Callable[..., None] = warp_specialised.forward
) -> tuple[Tensor, Tensor]:
    """out and lse, over NaN."""
    q, k, v, mask, *_ = case
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    tiles = mask.query_tiles(launch.block_q, launch.block_k)
    forward(q, k, v, mask.intervals, tiles, math.log2(math.e) / math.sqrt(q.shape[3]), launch, out, lse)
    return out, lse


def failures(case: check.Case, results: tuple[Tensor, ...]) -> list[Any]:
    """What misses its bound, of out and lse."""
    gold, eager = check.formula(case, torch.float64, torch.float64), check.eager_orders(case, 16)
    judged = {name: judge(*each) for name, *each in zip(check.RESULTS, results, eager, gold, strict=False)}
    return [(name, verdict) for name, verdict in judged.items() if not verdict.passed]


def make_case(mask: IntervalMask, seed: int, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> check.Case:
    return check.make_case(mask, dtype, torch.Generator().manual_seed(seed), **{"head_dim": 64} | shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, dtype: torch.dtype, seed: int) -> None:
    case = make_case(LAYOUTS[name].mask(), seed, dtype)
    assert not failures(case, run(case, SMALL))


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_random_layouts(head_dim: int, heads: tuple[int, int], seed: int) -> None:
    """Rows that differ, of an odd number of keys; masked and full tiles in many runs; padded lanes."""
    rng = random.Random(seed)
    mask = IntervalMask.stack([random_layout(rng, 201).mask() for _ in range(2)])
    case = make_case(mask, seed, head_dim=head_dim, heads=heads)
    assert not failures(case, run(case, SMALL._replace(num_stages=rng.choice([1, 2, 3]))))


@pytest.mark.parametrize(
    ("head_dim", "launch"), [(d, launch) for d, launches in SPECIALISED["forward"].items() for launch in launches]
)
def test_launches_that_tuning_tries(head_dim: int, launch: Launch, seed: int) -> None:
    mask = IntervalMask.from_spans(400, images=[(20, 276), (300, 360)], documents=[290, 110])
    case = make_case(mask, seed, head_dim=head_dim)
    assert not failures(case, run(case, launch))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (33, 7), (300, 200), (129, 31)])
def test_random_intervals(queries: int, keys: int, seed: int) -> None:
    """Queries that see nothing, blocks without a tile, more queries than keys and fewer."""
    start, end = torch.randint(-3, queries + 3, (2, 2, keys), generator=torch.Generator().manual_seed(seed))
    case = make_case(IntervalMask(start, end, queries), seed, batch=2)
    out, lse = run(case, SMALL)
    assert not failures(case, (out, lse))
    nothing = IntervalMask(torch.full((1, keys), queries), torch.zeros(1, keys, dtype=torch.int64), queries)
    out, lse = run(make_case(nothing, seed), SMALL)
    assert not out.any() and (lse == -torch.inf).all()


def test_strides_and_addresses(seed: int) -> None:
    """(B, N, H, D) views are read as they are; what the accelerator cannot describe is copied. No input changes."""
    case = make_case(LAYOUTS["adjacent_images"].mask(), seed, heads=(2, 2), batch=2)
    expected = run(case, SMALL)

    def laid_out(tensor: Tensor, how: str) -> Tensor:
        if how == "BNHD":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "odd rows":
            return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)  # an odd address

    for how in ("BNHD", "odd rows", "odd address"):
        views = [laid_out(tensor, how) for tensor in case[:3]]
        assert [torch.equal(*pair) for pair in zip(views, case[:3], strict=True)] == [True] * 3
        described = specialised_blocks.describe(views[0], 128)
        assert (described.base is views[0]) == (how == "BNHD")
        assert all(map(torch.equal, run(check.Case(*views, *case[3:]), SMALL), expected)), how
        assert [torch.equal(*pair) for pair in zip(views, case[:3], strict=True)] == [True] * 3
    expanded = case.k[:1, :1].expand(2, 2, -1, -1)
    assert specialised_blocks.describe(expanded, 32).base.is_contiguous()


@pytest.mark.parametrize("seed_of_order", range(3))
def test_the_order_of_events_does_not_show(seed_of_order: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = make_case(LAYOUTS["hidden_image"].mask(), 0)
    results = []
    for order in (seed, seed_of_order):
        monkeypatch.setattr(warp_specialised, "specialised_forward_kernel", WarpMachine(order)(KERNEL))
        results.append(run(case, SMALL))
    assert all(map(torch.equal, *results))


# ------------------------------------------------------------- the machine notices

BROKEN = {
    "keys are overwritten": ("mbarrier.wait(k_bars.index(STAGES + at), free)", "pass"),
    "values are overwritten": ("mbarrier.wait(v_bars.index(STAGES + at), free)", "pass"),
    "queries are overwritten": ("mbarrier.wait(q_bars.index(1), taken & 1 ^ 1)", "pass"),
    "keys are read early": ("mbarrier.wait(k_bars.index(n % STAGES), n // STAGES & 1)", "pass"),
    "values are read early": ("mbarrier.wait(v_bars.index(n % STAGES), n // STAGES & 1)", "pass"),
    "queries are read early": ("mbarrier.wait(q_bars.index(0), taken & 1)", "pass"),
    "scores are used early": ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(2, deps=[scores])"),
    "acc is used early": ("acc = warpgroup_mma_wait(0, deps=[acc])", "acc = warpgroup_mma_wait(1, deps=[acc])"),
    "keys are never freed": ("mbarrier.arrive(k_bars.index(STAGES + n % STAGES))", "pass"),
    "queries are never freed": ("mbarrier.arrive(q_bars.index(1))", "pass"),
    "values are freed early": (
        "acc = warpgroup_mma_wait(0, deps=[acc])\n    mbarrier.arrive(v_bars.index(STAGES + (n - 1) % STAGES))",
        "mbarrier.arrive(v_bars.index(STAGES + (n - 1) % STAGES))\n    acc = warpgroup_mma_wait(0, deps=[acc])",
    ),
    "one consumer frees for both": ("k_bars.index(STAGES + at), count=2", "k_bars.index(STAGES + at), count=1"),
    "the parity is wrong": ("n // STAGES & 1 ^ 1", "n // STAGES & 1"),
    "too few bytes": ("V_BYTES + 8 * BLOCK_K", "V_BYTES"),
    "no fence": ("fence_async_shared()  # the copies signal what these instructions wrote\n    rings", "rings"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(what: str, tmp_path: Path) -> None:
    module = changed([warp_specialised], [BROKEN[what]], tmp_path)
    kernel = module.specialised_forward_kernel
    case = make_case(IntervalMask.causal(400), 0, heads=(2, 2))
    right = run(case, SMALL)
    for order in range(20):
        module.specialised_forward_kernel = WarpMachine(order)(kernel)
        try:
            if not all(map(torch.equal, run(case, SMALL, module.forward), right)):
                return
        except Fault:
            return
    pytest.fail(f"nobody noticed in 20 orders of events: {what}")


# ------------------------------------------------------------- in the op


def test_plan_takes_it_for_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where heads are packed, keys split, or rows not multiples of 16 bytes, the plain kernel has the same tile."""
    special = Launch(128, 128, 12, 2)
    tuning.set_launch("attention", "forward", "interpret", torch.bfloat16, 64, special)
    try:
        plans = [
            plan_forward(torch.device("cpu"), torch.bfloat16, *sizes)
            for sizes in (
                (4, 4, 4, 512, 512, 64),
                (4, 4, 2, 100, 512, 64),
                (1, 1, 1, 128, 4096, 64),
                (4, 4, 4, 512, 512, 60),
                (4, 4, 4, 512, 0, 64),
            )
        ]
    finally:
        tuning.set_launch("attention", "forward", "interpret", torch.bfloat16, 64, Launch(32, 16, 4, 1))
    assert [plan.launch for plan in plans] == [special, *[special.plain] * 4]
    assert [plan.packed > 1 for plan in plans] == [False, True, False, False, False]
    assert [plan.splits > 1 for plan in plans] == [False, False, True, False, False]


def test_the_op_runs_what_the_table_says(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Forward here, backward of the shipped kernels: every gradient keeps its bound."""
    monkeypatch.setattr(tuning, "_TABLES", {name: _copied(table) for name, table in tuning._TABLES.items()})
    tuning.set_launch("attention", "forward", "interpret", torch.float16, 64, SMALL)
    launched: list[int] = []
    forward = warp_specialised.forward
    monkeypatch.setattr(warp_specialised, "forward", lambda *call: (launched.append(1), forward(*call)))
    mask = random_layout(random.Random(seed), 150).mask()
    case = make_case(mask, seed, torch.float16, heads=(4, 2), batch=2)
    verdicts = check.verdicts(case, check.run(case, "triton"))
    assert launched and all(verdict.passed for verdict in verdicts.values()), verdicts
    turned, scale = -case.q, 0.1
    negative = transfusion_attention(case.q, case.k, case.v, mask, scale=-scale, impl="triton")
    assert torch.equal(negative, transfusion_attention(turned, case.k, case.v, mask, scale=scale, impl="triton"))


def _copied(table: Any) -> Any:
    return {key: _copied(value) for key, value in table.items()} if isinstance(table, dict) else list(table)
