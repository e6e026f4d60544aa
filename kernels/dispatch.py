"""`define(...)` -> an op in torch's dispatcher: what autograd, fake tensors, `torch.compile` and checkpointing see.

It is `torch.library.custom_op` without what that does in Python at each call (defaults filled in from the schema,
outputs compared with inputs): small calls wait for the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo  # torch.compiler.disable would import dynamo here

_LIBRARY = torch.library.Library("transfusion", "FRAGMENT")


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """The op `transfusion::name`, which writes to none of its arguments and returns none of them.

    Args:
        schema: "(Tensor q, ...) -> Tensor", in torch's language, without defaults.
        run: computes the result, on every device.
        fake: like the result, empty.
        setup_context, backward: as `torch.library.register_autograd` takes them. Without them differentiating the op
            raises `NotImplementedError`, and so does differentiating twice where a backward calls such an op.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.transfusion, name).default
    # Where a graph breaks, dynamo would look into what the dispatcher calls.
    _LIBRARY.impl(name, disable_dynamo(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"transfusion::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _autograd(name, op, setup_context, backward), "Autograd")
    return op


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
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
            return Node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call
