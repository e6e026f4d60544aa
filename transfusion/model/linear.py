"""y = W·x; on a CPU, of few rows in float32, W in stretches, which run beside each other.

A product of few rows waits for W, which torch's BLAS has one core read; of a batch of narrower products each core takes
some. What that comes to are the rows decode_batch_1 and decode_batch_8 of `python -m benchmarks --suite generation`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_STRETCHES = 8
_FEW = 64  # rows; of more, arithmetic counts, which one product spreads over all cores as it is


class Linear(nn.Linear):
    """`nn.Linear` without a bias, the same up to the order of sums; in training and compiled it is that."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        weight = self.weight  # once: a parametrized one is computed
        return _in_stretches(x, weight) if _pays(x, weight) else functional.linear(x, weight)


def _pays(x: Tensor, weight: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    # quantized, sparse and traced weights know `linear` and little else
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    wide = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    fits = x.ndim > 0 and x.shape[-1] == weight.shape[-1] and weight.shape[0] % _STRETCHES == 0
    return plain and wide and fits and 0 < x.shape[:-1].numel() <= _FEW


def _in_stretches(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    stretches = weight.unflatten(0, (_STRETCHES, -1)).transpose(1, 2)
    product = torch.bmm(rows.expand(_STRETCHES, -1, -1), stretches)  # (stretches, rows, outputs of each)
    return product.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])
