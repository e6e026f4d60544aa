"""transfusion_attention: every implementation against the float64 gold, on the layouts that broke others."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.attention import check as rule
from transfusion.kernels.attention.check import RESULTS, Case, run
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import LAYOUTS, poison_empty, random_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly; on a device all three run.
DTYPES = [torch.float32, torch.float16] + ([] if TRITON_INTERPRET else [torch.bfloat16])


def make_case(
    mask: IntervalMask,
    dtype: torch.dtype,
    head_dim: int = 16,
    heads: tuple[int, int] = (2, 1),
    batch: int | None = None,
) -> Case:
    seed = random.randrange(2**32)
    print(f"input seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return rule.make_case(mask.to(DEVICE), dtype, generator, head_dim, heads, batch)


def check(case: Case, results: list[Tensor], names: tuple[str, ...] = RESULTS) -> None:
    verdicts = rule.verdicts(case, results)
    assert all(verdicts[name].passed for name in names), verdicts


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch.setattr)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_triton_on_the_layouts_that_broke_others(name: str, dtype: torch.dtype) -> None:
    case = make_case(LAYOUTS[name].mask(), dtype)
    before = [t.clone() for t in case if isinstance(t, Tensor)]
    check(case, run(case, "triton"))
    after = [t for t in case if isinstance(t, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was changed"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim", [16, 24, 64, 72, 80, 96, 128, 160, 256])
def test_triton_head_dims(head_dim: int) -> None:
    check(case := make_case(LAYOUTS["odd_length"].mask(), random.choice(DTYPES), head_dim), run(case, "triton"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)], ids=str)
def test_triton_grouped_heads_and_batch_varying_masks(heads: tuple[int, int]) -> None:
    rng = random.Random(random.randrange(2**32))
    mask = IntervalMask.stack([random_layout(rng, 50).mask() for _ in range(2)])
    check(case := make_case(mask, torch.float32, heads=heads), run(case, "triton"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [(1, 1), (1, 65), (33, 7), (5, 100), (64, 64)], ids=str)
def test_triton_any_number_of_queries_and_keys(size: tuple[int, int]) -> None:
    """Random intervals, empty ones and queries that see nothing included; one mask row for the whole batch."""
    start, end = torch.randint(-3, size[0] + 3, (2, 1, size[1]))
    mask = IntervalMask(start, end, size[0])
    check(case := make_case(mask, torch.float32), run(case, "triton"))


def test_queries_that_see_nothing_give_zero() -> None:
    mask = IntervalMask(torch.tensor([[4] * 20]), torch.tensor([[9] * 20]), 40)
    for impl in ("triton", "reference"):
        out, lse, dq, dk, dv = run(make_case(mask, torch.float32), impl)
        seen = torch.zeros(40, dtype=torch.bool, device=DEVICE)
        seen[4:9] = True
        assert (out[:, :, ~seen] == 0).all()
        assert (dq[:, :, ~seen] == 0).all()
        assert lse[:, :, ~seen].isneginf().all()
        assert all(t.isfinite().all() for t in (out, lse[:, :, seen], dq, dk, dv))
    assert (transfusion_attention(*make_case(mask, torch.float32)[:4], impl="sdpa")[:, :, ~seen] == 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_implementations(name: str) -> None:
    """sdpa's gradients are PyTorch's own; its result and theirs keep the same bound."""
    case = make_case(LAYOUTS[name].mask(), torch.float32, heads=(4, 2))
    check(case, run(case, "reference"))
    q, k, v = (t.detach().requires_grad_() for t in case[:3])
    out = transfusion_attention(q, k, v, case.mask, impl="sdpa")
    grads = torch.autograd.grad(out, [q, k, v], case.grad_out)
    silent = case._replace(grad_lse=torch.zeros_like(case.grad_lse))
    check(silent, [out.detach(), case.grad_lse, *grads], ("out", "dq", "dk", "dv"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_gradients_of_one_result(impl: str) -> None:
    """What nothing depends on is as if its gradient were 0, though no zeros are made for lse."""
    case = make_case(LAYOUTS["document_boundary_in_tile"].mask(), torch.float32, heads=(4, 2))
    leaves = [t.detach().requires_grad_() for t in case[:3]]

    def grads(out_grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Tensor, ...]:
        results = transfusion_attention(*leaves, case.mask, return_lse=True, impl=impl)
        given = [(t, g) for t, g in zip(results, (out_grad, lse_grad), strict=True) if g is not None]
        return torch.autograd.grad([t for t, _ in given], leaves, [g for _, g in given])

    zeros = torch.zeros_like(case.grad_out), torch.zeros_like(case.grad_lse)
    for alone, beside in (
        ((case.grad_out, None), (case.grad_out, zeros[1])),
        ((None, case.grad_lse), (zeros[0], case.grad_lse)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(grads(*alone), grads(*beside), strict=True))


@pytest.mark.usefixtures("poisoned")
def test_strides() -> None:
    """BNHD views, slices of a fused projection, an expanded gradient: no assumption on strides."""
    mask = LAYOUTS["odd_length"].mask()
    n = mask.num_queries
    fused = torch.randn(2, n, 3, 2, 32, device=DEVICE)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    contiguous = [t.contiguous() for t in (q, k, v)]
    out = transfusion_attention(q, k, v, mask.to(DEVICE), impl="triton")
    assert torch.equal(out, transfusion_attention(*contiguous, mask.to(DEVICE), impl="triton"))
    assert out.shape == q.shape
    leaf = fused.clone().requires_grad_()
    transfusion_attention(
        *(leaf[:, :, i].transpose(1, 2) for i in range(3)), mask.to(DEVICE), impl="triton"
    ).sum().backward()
    leaves = [t.clone().requires_grad_() for t in contiguous]
    transfusion_attention(*leaves, mask.to(DEVICE), impl="triton").sum().backward()
    assert leaf.grad is not None
    for i, plain in enumerate(leaves):
        assert plain.grad is not None
        assert torch.equal(leaf.grad[:, :, i].transpose(1, 2), plain.grad)
    transposed = q.mT.contiguous().mT  # last stride is not 1
    assert torch.equal(transfusion_attention(transposed, k, v, mask.to(DEVICE), impl="triton"), out)


FAR = {  # shape, strides and first number of a storage in which products of index and stride pass 2^31
    "rows": ((1, 1, 20, 16), (0, 0, 2**28, 1), 0),  # within one tile already
    "batch": ((3, 1, 20, 16), (2**30, 320, 16, 1), 2**31),  # one that wraps round reads the zeros of a hole
    "heads": ((1, 3, 20, 16), (320, 2**30, 16, 1), 2**31),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="test_attention_device has it on a GPU")
@pytest.mark.parametrize("what", FAR)
def test_what_may_lie_far_apart(what: str, tmp_path: Path) -> None:
    """Index and stride fit 32 bits each, their product does not. The storage is a file with holes: few pages exist."""
    mask, (shape, strides, first) = IntervalMask.causal(20), FAR[what]
    size = first + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + 1
    close = [torch.randn(shape).half() for _ in range(4)]

    def apart(name: int, tensor: Tensor) -> Tensor:
        storage = torch.from_file(str(tmp_path / str(name)), shared=True, size=size, dtype=torch.float16)
        (tmp_path / str(name)).unlink()  # it is mapped, and pytest keeps what lies here
        return storage.as_strided(shape, strides, first).copy_(tensor)

    results = []
    for *qkv, grad_out in (close, [apart(*each) for each in enumerate(close)]):
        leaves = [t.requires_grad_() for t in qkv]
        out = transfusion_attention(*leaves, mask, impl="triton")  # type: ignore[call-overload]
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of pairs that the mask then zeroes
def test_large_logits_stay_finite() -> None:
    case = make_case(LAYOUTS["adjacent_images"].mask(), torch.float32)
    scaled = case._replace(q=case.q * 300, k=case.k * 300)
    results = run(scaled, "triton")
    # exp(score - lse) rounds the difference of two numbers near 10^5: the gradients are finite, not as exact as softmax
    check(scaled, results, ("out", "lse"))
    assert all(t.isfinite().all() for t in results)


def test_backward_is_bitwise_deterministic() -> None:
    case = make_case(LAYOUTS["document_boundary_in_tile"].mask(), torch.float32, heads=(4, 2))
    first, *others = [run(case, "triton") for _ in range(3)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_reference_gradients_in_float64() -> None:
    mask = IntervalMask.stack([LAYOUTS["hidden_image"].mask(), LAYOUTS["hidden_image"].mask()])
    small = IntervalMask(mask.query_start[:, ::10] // 10, mask.query_end[:, ::10] // 10, 13)
    leaves = [torch.randn(2, h, 13, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    seen = small.to_dense().any(-1)[:, None]

    def outputs(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = transfusion_attention(*qkv, small, return_lse=True, impl="reference")
        return out, lse.masked_fill(~seen, 0)

    assert torch.autograd.gradcheck(outputs, leaves)


def test_bad_input_names_the_value() -> None:
    q, k, v, mask = make_case(IntervalMask.causal(20), torch.float32, heads=(4, 2))[:4]
    bad: list[tuple[type[Exception], str, tuple]] = [  # type: ignore[type-arg]
        (ValueError, r"\(4, 20, 16\)", (q[0], k, v, mask)),
        (ValueError, "3 query heads", (q[:, :3], k, v, mask)),
        (ValueError, "one shape", (q, k, v[:, :, :5], mask)),
        (ValueError, "batch or head dimension", (q, k[..., :8], v[..., :8], mask)),
        (ValueError, "20 queries by 20 keys", (q[:, :, :7], k, v, mask)),
        (ValueError, "2 rows for a batch of 1", (q, k, v, IntervalMask.stack([mask, mask]))),
        (TypeError, "float16", (q, k.half(), v, mask)),
        (TypeError, "int64", (q.long(), k, v, mask)),
        (TypeError, "IntervalMask", (q, k, v, mask.to_dense())),
        (ValueError, "meta", (q, k.to("meta"), v, mask)),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=message):
            transfusion_attention(*arguments)


def test_an_explicit_request_is_honoured_or_raises() -> None:
    q, k, v, mask = make_case(IntervalMask.causal(20), torch.float32)[:4]
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        transfusion_attention(q, k, v, mask, impl="fast")
    with pytest.raises(RuntimeError, match="log-sum-exp"):
        transfusion_attention(q, k, v, mask, impl="sdpa", return_lse=True)
    with pytest.raises(RuntimeError, match="head dimension 8"):
        transfusion_attention(q[..., :8], k[..., :8], v[..., :8], mask, impl="triton")
    with pytest.raises(RuntimeError, match="float64"):
        transfusion_attention(q.double(), k.double(), v.double(), mask, impl="triton")
