"""What only a GPU can show: offsets past 2^31, repeats, graphs, and the sanitizer. Skipped without one.

compute-sanitizer --tool memcheck  --error-exitcode 1 python -m pytest tests/kernels/test_attention_device.py -k small
compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest tests/kernels/test_attention_device.py -k small
"""

import copy

import pytest
import torch

from transfusion.kernels import IntervalMask, transfusion_attention, tuning
from transfusion.kernels.attention import check as rule
from transfusion.kernels.attention.plan import plan_backward, plan_forward
from transfusion.kernels.testing import Layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PACKED = Layout(2000, [(20, 276), (300, 556), (1100, 1612)], [600, 1400], [1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_small_suite(head_dim: int, dtype: torch.dtype) -> None:
    """A packed row with a hidden image, grouped heads, forward and backward: also what the sanitizer runs."""
    case = rule.make_case(PACKED.mask("cuda"), dtype, torch.Generator().manual_seed(head_dim), head_dim, (4, 2))
    verdicts = rule.verdicts(case, rule.run(case, "triton"))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper's instructions"
)
@pytest.mark.parametrize(
    ("stage", "head_dim", "launch"),
    [(stage, d, each) for stage, own in tuning.SPECIALISED.items() for d in own for each in own[d]],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_warp_specialised_suite(
    stage: str, head_dim: int, launch: tuning.Launch, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bounds, and the same bits each time: with as many heads as keep keys unsplit."""
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    tuning.set_launch("attention", stage, "sm_90", dtype, head_dim, launch)
    for size in (head_dim, head_dim - 24):
        sizes = (PACKED.length, PACKED.length, size)
        if stage == "forward":
            assert plan_forward(torch.device("cuda"), dtype, 1, 16, 8, *sizes).launch == launch
        else:
            assert plan_backward(torch.device("cuda"), dtype, stage.removeprefix("backward_"), *sizes) == launch
        case = rule.make_case(PACKED.mask("cuda"), dtype, torch.Generator().manual_seed(size), size, (16, 8))
        results = rule.run(case, "triton")
        verdicts = rule.verdicts(case, results)
        assert all(verdict.passed for verdict in verdicts.values()), verdicts
        for _ in range(10):
            assert all(map(torch.equal, rule.run(case, "triton"), results))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper's instructions"
)
@pytest.mark.parametrize(("queries", "keys"), [(1, 65), (33, 7), (1000, 300), (129, 2000)])
def test_small_warp_specialised_gradients_of_any_intervals(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that see nothing, blocks without a tile, rows past the end, grouped heads, odd lengths."""
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    for stage in ("backward_query", "backward_key"):
        launch = tuning.SPECIALISED[stage][128][0]
        tuning.set_launch("attention", stage, "sm_90", torch.bfloat16, 128, launch)
    generator = torch.Generator().manual_seed(queries)
    start, end = torch.randint(-3, queries + 3, (2, 2, keys), generator=generator)
    mask = IntervalMask(start, end, queries).to("cuda")
    case = rule.make_case(mask, torch.bfloat16, generator, 128, (6, 2), 2)
    verdicts = rule.verdicts(case, rule.run(case, "triton"))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


def test_small_decoding_suite() -> None:
    lengths = torch.tensor([0, 17, 4000], device="cuda")
    for new in (Layout(1, []), Layout(256, [(0, 256)])):
        mask = IntervalMask.continuation(new.mask("cuda"), lengths, 4352)
        case = rule.make_case(mask, torch.bfloat16, torch.Generator().manual_seed(1), 128, (28, 4), 3)
        verdicts = rule.verdicts(case, rule.run(case, "triton"))
        assert all(verdict.passed for verdict in verdicts.values()), verdicts


def test_ten_backwards_are_bitwise_equal() -> None:
    case = rule.make_case(PACKED.mask("cuda"), torch.bfloat16, torch.Generator().manual_seed(2), 128, (8, 2), 2)
    first, *others = [rule.run(case, "triton") for _ in range(10)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_offsets_past_2_to_the_31() -> None:
    """q, k and v of more than 2^31 elements: the last heads of the last row come out as they do alone."""
    batch, heads, length, dim = 9, 64, 32768, 128
    assert batch * heads * length * dim > 2**31
    q, k, v = (torch.empty(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3))
    mask = IntervalMask.sliding_window(length, 128, "cuda")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = transfusion_attention(*leaves, mask, impl="triton")
    alone = [t[-1:, -1:].detach().clone().requires_grad_() for t in (q, k, v)]
    expected = transfusion_attention(*alone, mask, impl="triton")
    assert torch.equal(out[-1:, -1:], expected)
    grads = torch.autograd.grad(out, leaves, torch.ones((), device="cuda", dtype=out.dtype).expand_as(out))
    wanted = torch.autograd.grad(expected, alone, torch.ones_like(expected))
    assert all(torch.equal(grad[-1:, -1:], want) for grad, want in zip(grads, wanted, strict=True))


def test_cuda_graph_of_forward_and_backward() -> None:
    """Captured with its tiles, replayed on another mask and other numbers."""
    q, k, v = (torch.randn(2, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    causal = IntervalMask.causal(1024, "cuda")
    start, end = causal.query_start.clone(), causal.query_end.clone()

    def step() -> tuple[torch.Tensor, ...]:
        out = transfusion_attention(q, k, v, IntervalMask(start, end, 1024), impl="triton")
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = Layout(1024, [(30, 500)], [700, 324]).mask("cuda")
    start.copy_(other.query_start)
    end.copy_(other.query_end)
    graph.replay()
    assert all(map(torch.equal, captured, step()))
