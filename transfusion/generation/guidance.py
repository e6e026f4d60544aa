"""prediction = unconditional + scale·(conditional - unconditional), at some times, and rescaled.

Classifier-free guidance of Ho & Salimans 2022 (arXiv 2207.12598), the unconditional document being the one that
caption dropout leaves in training: BOS, then the image.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.generation.arguments import real


@dataclass(frozen=True)
class Guidance:
    """How strongly, and when, an image is held to what comes before it.

    Args:
        scale: 1 is the model as trained, without an unconditional branch; the paper takes 3 and 5.
        interval: times within [0, 1], 0 the clean image and 1 pure noise, between which guidance is on (Kynkäänniemi
            et al. 2024, arXiv 2404.07724); outside, the unconditional branch is not computed.
        rescale: how much of the guided prediction's standard deviation, image by image, is brought back to that of the
            conditional one (Lin et al. 2024, arXiv 2305.08891, section 3.4, which takes 0.7).

    Raises:
        ValueError: a number out of range.
        TypeError: what is no number.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        real("guidance scale", self.scale)
        real("guidance rescale", self.rescale)
        ordered = hasattr(self.interval, "__len__") and hasattr(self.interval, "__getitem__")
        if isinstance(self.interval, str) or not ordered:
            raise TypeError(f"guidance interval={self.interval!r} must be two times, (low, high)")
        for time in self.interval:
            real("a time of the guidance interval", time)
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance scale={self.scale} must be a number >= 0; 1 turns guidance off")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval={self.interval} must be (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale={self.rescale} must be within [0, 1]; 0 turns it off")

    @property
    def off(self) -> bool:
        """No step needs the unconditional branch."""
        return self.scale == 1

    def active(self, time: float) -> bool:
        """Whether a step at `time` in [0, 1] needs the unconditional branch."""
        return not self.off and self.interval[0] <= time <= self.interval[1]

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided prediction, of two like it (I, C, h, w)."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if not self.rescale:
            return guided
        deviation, wanted = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (guided, conditional))
        # a prediction that is one number everywhere has no deviation to bring back
        rescaled = guided * torch.where(deviation > 0, wanted / deviation, 1.0)
        return self.rescale * rescaled + (1 - self.rescale) * guided
