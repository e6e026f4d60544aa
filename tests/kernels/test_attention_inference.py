"""Few queries over many keys: heads packed in one program, keys split over several, over a cache with unequal rows."""

import random

import pytest
import torch

from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.attention import check as rule
from transfusion.kernels.attention import plan
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import Layout, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([] if TRITON_INTERPRET else [torch.bfloat16])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch.setattr)


def generator() -> torch.Generator:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def check(case: rule.Case) -> None:
    verdicts = rule.verdicts(case, rule.run(case, "triton"))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


def split_into(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward from now on in `count` splits, whatever the device and the number of keys."""

    def forced(*call: object) -> plan.Plan:
        return plan.plan_forward(*call)._replace(splits=count)  # type: ignore[arg-type]

    monkeypatch.setattr("transfusion.kernels.attention.kernel.online_softmax.plan_forward", forced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=str)
def test_one_new_token_over_a_cache(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows of unequal length, an empty one among them, and room behind each that no query sees."""
    lengths = torch.tensor([0, 1, 97, 150])
    mask = IntervalMask.continuation(IntervalMask.causal(1), lengths, 151).to(DEVICE)
    case = rule.make_case(mask, dtype, generator(), heads=heads, batch=4)
    assert plan.plan_forward(case.q.device, dtype, 4, *heads, 1, 151, 16).splits > 1 or heads[1] > 1 or DEVICE != "cpu"
    check(case)


@pytest.mark.parametrize(("splits", "heads"), [(1, (4, 2)), (3, (4, 2)), (50, (1, 1))])
def test_an_image_over_a_cached_prefix(splits: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of image queries after prefixes of unequal length; more splits than tiles leave some without any."""
    split_into(splits, monkeypatch)
    new = Layout(random.choice([16, 30, 70]), [(1, 15)]).mask()
    mask = IntervalMask.continuation(new, torch.tensor([0, 64]), 140).to(DEVICE)
    check(rule.make_case(mask, random.choice(DTYPES), generator(), heads=heads, batch=2))


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_more_splits_than_are_added_at_once(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one head over a long cache has them on a large GPU: two for each of its processors."""
    split_into(264, monkeypatch)
    mask = IntervalMask.continuation(IntervalMask.causal(1), torch.tensor([0, 1200]), 1201).to(DEVICE)
    check(rule.make_case(mask, torch.float32, generator(), head_dim, heads=(1, 1), batch=2))


@pytest.mark.parametrize("splits", [1, 7])
def test_splits_of_any_mask(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random intervals: masked and full runs, queries that see nothing, in a split too."""
    split_into(splits, monkeypatch)
    numbers = generator()
    start, end = torch.randint(-9, 45, (2, 2, 130), generator=numbers)
    start[0, 20:70], end[0, 20:70] = 0, 40  # full tiles for every query
    case = rule.make_case(
        IntervalMask(start, end, 40).to(DEVICE), random.choice(DTYPES), numbers, heads=(3, 1), batch=2
    )
    check(case)


def test_splits_are_summed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(5, monkeypatch)
    mask = IntervalMask.continuation(IntervalMask.causal(3), torch.tensor([90, 17]), 128).to(DEVICE)
    case = rule.make_case(mask, torch.float32, generator(), heads=(4, 2), batch=2)
    first, *others = [rule.run(case, "triton") for _ in range(3)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("factor", [-2.0, 0.0, 8.0])
def test_negative_and_zero_scales(factor: float) -> None:
    """scale·(q·k) = (factor·q)·k / √D at scale = factor / √D: the formula, of queries times a power of two, exactly."""
    case = rule.make_case(Layout(50, [(5, 40)]).mask(DEVICE), torch.float32, generator(), head_dim=16)
    q, k, v = (t.detach().requires_grad_() for t in case[:3])
    out, lse = transfusion_attention(q, k, v, case.mask, scale=factor / 4, return_lse=True, impl="triton")
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [case.grad_out, case.grad_lse])
    assert torch.equal(q, case.q) and (factor or not dq.any())
    scaled = case._replace(q=case.q * factor)
    verdicts = rule.verdicts(scaled, [out.detach(), lse.detach(), dq / (factor or 1), dk, dv])
    assert all(verdict.passed for name, verdict in verdicts.items() if factor or name != "dq"), verdicts


def test_an_empty_batch_is_an_empty_result() -> None:
    mask = IntervalMask.causal(20, DEVICE)
    for heads in (2, 0):
        q, k = (torch.zeros(0 if heads else 2, h, 20, 16, device=DEVICE, requires_grad=True) for h in (heads, 1))
        out, lse = transfusion_attention(q, k, k, mask, return_lse=True, impl="triton")
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        for grad, leaf in zip(torch.autograd.grad(out.sum() + lse.sum(), [q, k]), (q, k), strict=True):
            assert grad.shape == leaf.shape and not grad.any()


def test_the_plan() -> None:
    """One token of grouped heads reads each key once, in as many programs as keep the device busy; training does not
    split. The workspace is bounded by the device, whatever N and M."""

    def planned(batch: int, heads: int, kv_heads: int, queries: int, keys: int) -> plan.Plan:
        return plan.plan_forward(torch.device("cpu"), torch.bfloat16, batch, heads, kv_heads, queries, keys, 128)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.tuning, "table_name", lambda device: "sm_90")
        patch.setattr(plan.tuning, "processors", lambda device: 132)
        decode = planned(1, 28, 4, 1, 65536)
        assert (decode.launch.block_q, decode.packed, decode.blocks, decode.splits) == (16, 7, 1, 66)
        assert planned(64, 64, 8, 1, 4096).splits == 1
        assert planned(2, 32, 32, 256, 8192).packed == 1
        assert planned(4, 32, 32, 4096, 4096).splits == 1
        for queries in (1, 16, 64, 256, 1024):
            for batch, heads, kv_heads in ((1, 32, 32), (1, 64, 8), (4, 28, 4)):
                each = planned(batch, heads, kv_heads, queries, 32768)
                if each.splits > 1:
                    programs = each.blocks * batch * heads // each.packed * each.splits
                    assert programs * each.launch.block_q <= 132 * 2 * 128


def test_backward_tiles_are_built_only_for_gradients() -> None:
    mask = IntervalMask.causal(40, DEVICE)
    q, k, v = rule.make_case(mask, torch.float32, generator())[:3]
    transfusion_attention(q, k, v, mask, impl="triton")
    assert {key[0] for key in mask._derived} == {"query_tiles"} and len(mask._derived) == 1
