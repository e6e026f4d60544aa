"""y = W·x; on a CPU, of few rows in float32, W in stretches, which run beside each other.

A product of few rows waits for W, and the BLAS that torch carries reads it on one core: as a batch of narrower products
all cores read.
"""

import torch
from torch import Tensor, nn

_STRETCHES = 8
_FEW = 64  # rows; of more, one product occupies all cores as it is


class Linear(nn.Linear):
    """`nn.Linear` without a bias, the same up to the order of sums."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self._in_stretches(x) if self._pays(x) else super().forward(x)

    def _pays(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return False
        rows = x.shape[:-1].numel()
        wide = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        fits = x.shape[-1] == self.in_features and self.out_features % _STRETCHES == 0
        return wide and fits and 0 < rows <= _FEW

    def _in_stretches(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        stretches = self.weight.unflatten(0, (_STRETCHES, -1)).transpose(1, 2)
        product = torch.bmm(rows.expand(_STRETCHES, -1, -1), stretches)  # (stretches, rows, outputs of each)
        return product.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
