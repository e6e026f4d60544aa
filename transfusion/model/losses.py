"""loss = mean_t( logsumexp(W·h_t) - (W·h_t)[target_t] ): the text loss without the logits of all tokens at once.

The rows are taken in chunks. While a chunk's logits are there, so is everything for its gradient: softmax minus the
target, times W and times h. So the forward pass makes the gradients too, and the backward pass scales them.

    bytes = (chunk·V + V·D + T·D)·itemsize + (chunk·V + V·D)·4      instead of T·V·(2·itemsize + 8)

torch 2.13's own `linear_cross_entropy` does the same, but not in torch 2.11, and it writes into what it saved for
backward, which keeps it out of a compiled graph; so there is an op of our own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transfusion.kernels.dispatch import autocast_dtype, define
from transfusion.kernels.registry import refuse_forward_mode

CHUNK = 1024  # rows; with 32,000 tokens their logits are 131 MB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """mean_t( logsumexp(W·h_t) - (W·h_t)[target_t] ), in nats.

    Args:
        hidden: (T, D) floating point, T at least 1.
        weight: (V, D), in autocast's dtype where that is on, as `nn.Linear` would have it.
        target: (T,) int64 in 0 .. V - 1.
        chunk: rows whose logits are held at once. Results differ by rounding between chunk sizes.

    Returns:
        () float32, float64 for float64 inputs; sums over the vocabulary are in that dtype, the mean over rows is taken
        in float64. Differentiable once in hidden and weight. Bitwise deterministic.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: different dtypes.
        NotImplementedError: forward-mode derivatives, and second ones.
    """
    refuse_forward_mode("linear_cross_entropy", hidden, weight)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden (T, D), weight (V, D) and target (T,) have shapes {tuple(hidden.shape)}, {tuple(weight.shape)} "
            f"and {tuple(target.shape)}"
        )
    if not hidden.shape[0] or chunk < 1:
        raise ValueError(f"the mean over {hidden.shape[0]} rows in chunks of {chunk} is not defined")
    if dtype := autocast_dtype(hidden.device):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, weight is {weight.dtype}; cast one of them")
    wants = torch.is_grad_enabled()
    loss, _, _ = _with_gradients(
        hidden, weight, target, chunk, wants and hidden.requires_grad, wants and weight.requires_grad
    )
    return loss


@torch.library.custom_op("transfusion::linear_cross_entropy", mutates_args=())
def _with_gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, chunk: int, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss (), its gradients (T, D) and (V, D); a gradient that is not wanted is empty."""
    rows, exact = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(rows, dtype=exact, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if for_hidden else hidden.new_empty(0)
    summed = torch.zeros_like(weight, dtype=exact) if for_weight else weight.new_empty(0)
    for first in range(0, rows, chunk):
        part, wanted = hidden[first : first + chunk], target[first : first + chunk, None]
        log_p = functional.log_softmax(part @ weight.T, 1, dtype=exact)
        right = log_p.gather(1, wanted)
        losses[first : first + chunk] = -right[:, 0]
        if not (for_hidden or for_weight):
            continue
        # rows times the gradient of the logits: p, and p - 1 of the target
        grad_logits = torch.exp(
            log_p, out=log_p if hidden.dtype == exact else torch.empty_like(log_p, dtype=part.dtype)
        )
        grad_logits.scatter_(1, wanted, right.expm1().to(part.dtype))
        if for_hidden:
            into = grad_hidden[first : first + chunk]
            torch.addmm(into, grad_logits, weight, beta=0, alpha=1 / rows, out=into)
        if for_weight and weight.dtype == exact:
            summed.addmm_(grad_logits.T, part, alpha=1 / rows)
        elif for_weight:
            summed += torch.addmm(weight, grad_logits.T, part, beta=0, alpha=1 / rows)  # scaled before it is rounded
        del log_p, grad_logits  # before the next chunk's are made
    return losses.mean(dtype=torch.float64).to(exact), grad_hidden, summed.to(weight.dtype)


@_with_gradients.register_fake
def _(
    hidden: Tensor, weight: Tensor, target: Tensor, chunk: int, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if for_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if for_weight else weight.new_empty(0)
    return hidden.new_empty((), dtype=exact), grad_hidden, grad_weight


# An op, for it has no derivative: where `twice` requires grad, differentiating its result raises.
_scaled = define(
    "linear_cross_entropy_backward",
    "(Tensor saved, Tensor grad, Tensor twice) -> Tensor",
    lambda saved, grad, twice: saved * grad,
    lambda saved, grad, twice: torch.empty_like(saved),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # of the other two there are none: zeros as large as they would be filled
    ctx.save_for_backward(grad_hidden, grad_weight)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 6
    # a second derivative would lack what comes through the saved gradients, which autograd takes as constants
    twice = grad_loss.new_empty(0, requires_grad=torch.is_grad_enabled())
    grads = [_scaled(saved, grad_loss.to(saved.dtype), twice) if saved.numel() else None for saved in ctx.saved_tensors]
    return (*grads, None, None, None, None)


_with_gradients.register_autograd(_backward, setup_context=_setup_context)
