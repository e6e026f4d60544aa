"""time_i = limit_i·F⁻¹(u_i): when each image of a batch is noised to, from 0 (data) to 1 (noise).

    distribution   F⁻¹(u)                          spread        u_1 .. u_I
    uniform        u                               stratified    (slot_i + jitter_i) / I, the slots permuted
    logit_normal   sigmoid(mean + std·Φ⁻¹(u))      antithetic    pairs u, 1 - u, permuted
                                                   independent   uniform each

The spread lowers the variance of a batch's mean loss and leaves each image's own distribution as it is.

Sources: logit-normal times, Esser et al. 2024 (arXiv 2403.03206, section 3.1); stratified ones, Kingma et al. 2021
(arXiv 2107.00630, appendix I.1); the limit of an image before its caption, arXiv 2408.11039, section 4.3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Distribution = Literal["uniform", "logit_normal"]
Spread = Literal["stratified", "antithetic", "independent"]

_BELOW_ONE = 1 - 2**-24  # the largest float32 under 1


@dataclass(frozen=True)
class TimeSampling:
    """How diffusion times are drawn. The default is uniform, as the paper's, and evenly spread over the batch.

    Args:
        distribution: "uniform" or "logit_normal".
        mean: of the logit-normal's normal; above 0 leans to noise.
        std: of the logit-normal's normal.
        spread: "stratified", "antithetic" or "independent".
        max_time: largest time of any image, in (0, 1]; an image's own limit may be lower.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    distribution: Distribution = "uniform"
    mean: float = 0.0
    std: float = 1.0
    spread: Spread = "stratified"
    max_time: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (("distribution", Distribution), ("spread", Spread)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean} must be finite")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std} must be positive and finite")
        if not 0 < self.max_time <= 1:
            raise ValueError(f"max_time={self.max_time} must be in (0, 1]")

    def draw(self, limits: Sequence[float], generator: torch.Generator) -> Tensor:
        """-> (I,) float32 in [0, limit_i), on the CPU: a pure function of the limits and the generator's state.

        `limits`: each image's largest time, in (0, 1]; the distribution is scaled to it.
        """
        uniform = self._uniform(len(limits), generator).clamp(max=_BELOW_ONE)
        if self.distribution == "logit_normal":
            uniform = torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform)).clamp(max=_BELOW_ONE)
        return uniform * torch.tensor(
            [min(limit, self.max_time) for limit in limits], dtype=torch.float32, device="cpu"
        )

    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        if self.spread == "independent":
            return _rand(count, generator)
        slots = torch.randperm(count, generator=generator, device="cpu")
        if self.spread == "antithetic":
            half = _rand((count + 1) // 2, generator)
            return torch.cat([half, 1 - half])[:count][slots]
        return (slots + _rand(count, generator)) / max(count, 1)


def _rand(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
