"""One adapter for each way to compute attention, all called alike.

reason = adapter.why_not(case)                 None, or why the adapter cannot take the case here
mask = adapter.mask(case, mask)                what it computes: the case's own mask, or for a speed of light another
prepared = adapter.prepare(mask, q, k, v)      all that a new batch's mask costs, timed apart
out = adapter(prepared, q, k, v)               differentiable where the case has a backward
"""

from typing import Any

from torch import Tensor

from benchmarks.cases import AttentionCase
from transfusion.kernels import IntervalMask, transfusion_attention


class Baseline:
    """`transfusion_attention` with one `impl`; the other adapters change parts of it.

    measures: what is timed. ours: whether its failure is a fault of this repository; a library that breaks is skipped.
    """

    measures: tuple[str, ...] = ("forward", "backward", "prepare")

    def __init__(self, name: str, impl: str, ours: bool = False) -> None:
        self.name, self.impl, self.ours = name, impl, ours

    def why_not(self, case: AttentionCase) -> str | None:
        return None

    def mask(self, case: AttentionCase, mask: IntervalMask) -> IntervalMask:
        return mask

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return mask

    def __call__(self, prepared: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return transfusion_attention(q, k, v, prepared, impl=self.impl)
