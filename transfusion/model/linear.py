"""y = W·x, and silu(G·x) ∘ (U·x); on a CPU, in float32 without gradients, as several narrower products.

A product of few rows waits for W, which torch's BLAS has one core read; of a batch of narrower products each core takes
some. Of many rows a wide W falls out of a core's cache, where half of it stays; and half a result can be written over,
where for a new one the system would clear memory. What that comes to are the rows of `python -m benchmarks --suite
generation`: decode_batch_1 and decode_batch_8 of few rows, draw_4_images of many.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as modules

_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
_GLOBAL_HOOKS = [getattr(modules, f"_global{hooks}") for hooks in _HOOKS]
_STRETCHES = 8
_FEW = 64  # rows; of more, arithmetic counts, which one product spreads over all cores as it is


class Linear(nn.Linear):
    """`nn.Linear` without a bias, the same up to the order of sums; in training and compiled it is that."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        weight = self.weight  # once: a parametrized one is computed
        stretches = weight.shape[0] % _STRETCHES == 0 and _is_plain(x, weight) and 0 < _rows(x) <= _FEW
        return _in_stretches(x, weight) if stretches else functional.linear(x, weight)


def swiglu(gate_up: nn.Module, x: Tensor) -> Tensor:
    """silu(gate) ∘ up of the halves of `gate_up(x)`'s last dimension, (..., dim) -> (..., ffn_dim), the same up to the
    order of sums.

    A module that `is_no_more_than_its_weight` is not called.
    """
    if is_no_more_than_its_weight(gate_up):
        weight = gate_up.weight
        if weight.shape[0] % 2 == 0 and _is_plain(x, weight) and _rows(x) > _FEW:
            gate, up = (functional.linear(x, half) for half in weight.chunk(2))
            return functional.silu(gate, inplace=True).mul_(up)
    gate, up = gate_up(x).chunk(2, dim=-1)
    return functional.silu(gate) * up


def is_no_more_than_its_weight(linear: nn.Module) -> TypeGuard[Linear]:
    """Whether a call of it is W·x and nothing else: no adapter or quantized layer in its place, no hook, no `forward`
    that somebody put over its own."""
    own = isinstance(linear, Linear) and type(linear).forward is Linear.forward and "forward" not in vars(linear)
    return own and not any(getattr(linear, hooks) for hooks in _HOOKS) and not any(_GLOBAL_HOOKS)


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but this product sees the weight."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    # quantized, sparse and traced weights support `linear` and little else
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    wide = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and wide and weight.device == x.device and x.ndim > 0 and x.shape[-1] == weight.shape[-1]


def _in_stretches(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    stretches = weight.unflatten(0, (_STRETCHES, -1)).transpose(1, 2)
    product = torch.bmm(rows.expand(_STRETCHES, -1, -1), stretches)  # (stretches, rows, outputs of each)
    return product.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])
