"""`define(...)` -> an op in torch's dispatcher: what autograd, fake tensors, `torch.compile` and checkpointing see.

It is `torch.library.custom_op` without the work that one does in Python at each call (filling in defaults from the
schema, comparing outputs with inputs). Where nothing but autograd looks at a call, autograd is entered directly instead
of through the dispatcher. Both matter for small calls, which wait for the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo as disable_dynamo  # torch.compiler.disable would import all of dynamo here

_LIBRARY = torch.library.Library("transfusion", "FRAGMENT")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on `device`; None where it is off."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch refuses to answer for meta
        return None
    return torch.get_autocast_dtype(kind)


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """-> a function that calls the op `transfusion::name`, which writes to no argument and returns none.

    Args:
        schema: "(Tensor q, ...) -> Tensor", in torch's language, without defaults.
        run: computes the result, on every device.
        fake: like the result, empty.
        setup_context, backward: as `torch.library.register_autograd` takes them. Without them differentiating the op
            raises `NotImplementedError`, and so does differentiating twice where a backward calls such an op.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.transfusion, name).default
    _LIBRARY.impl(name, _out_of_sight(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"transfusion::{name}", fake, lib=_LIBRARY)
    autograd = _autograd(name, op, setup_context, backward)
    _LIBRARY.impl(name, autograd, "Autograd")

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*inputs)
        return autograd(*inputs)

    return call


def _out_of_sight(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, hidden from dynamo, which after a graph break would trace into what the dispatcher calls."""
    hidden = disable_dynamo(run)

    def call(*inputs: Any) -> Any:
        return run(*inputs) if get_eval_frame_callback() is None else hidden(*inputs)

    return call


def _autograd(
    name: str, op: Any, setup_context: Callable[..., None] | None, derivative: Callable[..., Any] | None
) -> Callable[..., Any]:
    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if derivative is None:
                raise NotImplementedError(f"transfusion::{name} has no derivative")
            return derivative(ctx, *grads)

    Node.__name__ = Node.__qualname__ = f"{name}_backward"

    def call(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(f"transfusion::{name} under torch.func.grad or vjp: use torch.autograd instead")
        if torch.is_grad_enabled():
            for each in inputs:
                if isinstance(each, Tensor) and each.requires_grad:
                    return Node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


def new_like(tensor: Tensor) -> Tensor:
    """An empty result like `tensor` (B, H, N, D), for an op and its fake kernel alike; with its strides where possible.

    The last stride is 1, because the kernels write with it; `torch.empty_like` gives another where elements overlap.
    """
    result = torch.empty_like(tensor)
    return result if result.stride(3) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)
