"""`define`: an op with and without a derivative, under autograd, torch.compile and opcheck."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.dispatch import define


def _save(ctx: object, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0])  # type: ignore[attr-defined]
    ctx.factor = inputs[1]  # type: ignore[attr-defined]


SCALED = define(
    "scaled_squares_of_tests",
    "(Tensor x, float factor) -> (Tensor, Tensor)",
    lambda x, factor: (factor * x * x, x.sum(-1)),
    lambda x, factor: (torch.empty_like(x), x.new_empty(x.shape[:-1])),
    setup_context=_save,
    backward=lambda ctx, g, g_sum: (2 * ctx.factor * ctx.saved_tensors[0] * g + g_sum[..., None], None),
)
PLAIN = define("plain_squares_of_tests", "(Tensor x) -> Tensor", lambda x: x * x, lambda x: torch.empty_like(x))
TWICE = define(
    "twice_of_tests",
    "(Tensor x) -> Tensor",
    lambda x: 2 * x,
    lambda x: torch.empty_like(x),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, g: PLAIN(ctx.saved_tensors[0]) * g,
)


def loss(x: Tensor) -> Tensor:
    squares, sums = SCALED(x, 3.0)
    return (squares * torch.arange(1.0, 5.0)).sum() + 2 * sums.sum()


def expected(x: Tensor) -> Tensor:
    return (3 * x * x * torch.arange(1.0, 5.0)).sum() + 2 * x.sum()


def test_the_derivative_is_the_formula() -> None:
    x = torch.randn(3, 4)
    wanted = torch.func.grad(expected)(x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad, wanted)
    compiled = x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, wanted)


def test_what_needs_no_gradient_has_none() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not any(each.requires_grad for each in SCALED(leaf, 1.0))
    assert not any(each.requires_grad for each in SCALED(leaf.detach(), 1.0))
    with torch.inference_mode():
        assert SCALED(leaf, 1.0)[0].is_inference()


@pytest.mark.parametrize("differentiated", [False, True])
def test_modes_see_the_op_and_nothing_within(differentiated: bool) -> None:
    """Counters, checkpointing policies and profilers, though eager calls reach autograd without the dispatcher."""
    seen: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, op = torch.randn(3, 4, requires_grad=differentiated), torch.ops.transfusion.scaled_squares_of_tests.default
    with Watch():
        SCALED(x, 2.0)
    assert seen == [op]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        SCALED(x, 2.0)
    assert [event.count for event in profile.key_averages() if event.key == op.name()] == [1]


def test_opcheck() -> None:
    ops = torch.ops.transfusion
    torch.library.opcheck(ops.scaled_squares_of_tests.default, (torch.randn(3, 4, requires_grad=True), 2.0))
    torch.library.opcheck(ops.plain_squares_of_tests.default, (torch.randn(3, 4),))


def test_derivatives_that_are_not_there_are_refused() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="transfusion::plain_squares_of_tests has no derivative"):
        PLAIN(leaf).sum().backward()
    (grad,) = torch.autograd.grad(TWICE(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="plain_squares"):
        (grad.sum() + leaf.sum()).backward()


def test_what_attention_refuses() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 16).unbind()
    mask = IntervalMask.from_spans(20, [(4, 12)])

    def total(q: Tensor) -> Tensor:
        return transfusion_attention(q, k, v, mask, impl="reference").square().sum()

    leaf = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward has no derivative"):
        (grad.sum() + leaf.sum()).backward()
    with pytest.raises(NotImplementedError, match=r"use torch\.autograd"):
        torch.func.grad(total)(q)
