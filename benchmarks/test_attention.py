"""Attention over packed rows, forward and backward, against PyTorch's own attention under the same mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import ATTENTION, DEVICE, DTYPE, AttentionCase
from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.attention import reference
from transfusion.kernels.testing import judge

IMPLEMENTATIONS = ["triton", "flex", "sdpa", "reference"] if DEVICE == "cuda" else ["sdpa", "reference"]


def make(case: AttentionCase) -> tuple[list[Tensor], IntervalMask]:
    heads = (case.heads, case.kv_heads, case.kv_heads)
    shape = (case.length, case.head_dim)
    leaves = [torch.randn(case.batch, h, *shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for h in heads]
    return leaves, case.mask()


def gate(leaves: list[Tensor], mask: IntervalMask, impl: str) -> None:
    """No time is taken of an implementation whose output is wrong. One row and one head stand for all: memory."""
    rows = IntervalMask(mask.query_start[:1], mask.query_end[:1], mask.num_queries)
    q, k, v = (leaf.detach()[:1, :1] for leaf in leaves)
    vectors, scale = (rows.query_start, rows.query_end), q.shape[-1] ** -0.5
    out = transfusion_attention(q, k, v, rows, impl=impl)
    gold, _ = reference.forward(q.double(), k.double(), v.double(), *vectors, scale)
    eager, _ = reference.forward(q, k, v, *vectors, scale, q.dtype)
    verdict = judge(out, eager, gold)
    assert verdict.passed, (impl, verdict)


def synchronized(work: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        result = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return call


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ATTENTION)
def test_forward(benchmark: Any, name: str, impl: str) -> None:
    leaves, mask = make(ATTENTION[name])
    gate(leaves, mask, impl)
    inputs = [leaf.detach() for leaf in leaves]
    benchmark.group = f"attention forward {name}"
    benchmark.extra_info["flops"] = 4 * mask.area().sum().item() * ATTENTION[name].heads * ATTENTION[name].head_dim
    benchmark.pedantic(
        synchronized(lambda: transfusion_attention(*inputs, mask, impl=impl)), warmup_rounds=2, rounds=10
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ATTENTION)
def test_forward_backward(benchmark: Any, name: str, impl: str) -> None:
    leaves, mask = make(ATTENTION[name])
    gate(leaves, mask, impl)
    grad = torch.randn_like(leaves[0])

    def step() -> Any:
        return torch.autograd.grad(transfusion_attention(*leaves, mask, impl=impl), leaves, grad)

    benchmark.group = f"attention forward + backward {name}"
    benchmark.extra_info["flops"] = 14 * mask.area().sum().item() * ATTENTION[name].heads * ATTENTION[name].head_dim
    benchmark.pedantic(synchronized(step), warmup_rounds=2, rounds=10)


@pytest.mark.parametrize("name", ATTENTION)
def test_mask_preparation(benchmark: Any, name: str) -> None:
    """Everything that the kernels need of a new batch's mask."""
    mask = ATTENTION[name].mask()

    def prepare() -> Any:
        fresh = IntervalMask(mask.query_start, mask.query_end, mask.num_queries)
        return fresh.query_tiles(128, 128), fresh.query_tiles(128, 64), fresh.key_tiles(64, 128)

    benchmark.group = f"mask preparation {name}"
    benchmark.pedantic(synchronized(prepare), warmup_rounds=2, rounds=10)
