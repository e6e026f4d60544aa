"""token = W·(patch + e(t)): how the patches of a noised image enter and leave the transformer.

The paper's linear codec (arXiv 2408.11039, section 3.2): the timestep embedding is added to every patch vector before
one linear layer; after the transformer another one predicts the patch.
"""

import math

import torch
from torch import Tensor, nn

from transfusion.config import ModelConfig

_FREQUENCIES = 128  # sine and cosine of each; the paper is silent, this is DDPM's and diffusers' usual width


class TimestepEmbedding(nn.Module):
    """e(t) = W2·silu(W1·[cos(t·ω), sin(t·ω)]), ω geometric from 1 to 1/10000."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * _FREQUENCIES, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep (I,) in thousandths of the path, any number dtype -> (I, dim); `dtype` is what the weights take."""
        exponent = torch.arange(_FREQUENCIES, dtype=torch.float32, device=timestep.device) / _FREQUENCIES
        angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.down(nn.functional.silu(self.up(features.to(dtype))))


class LinearCodec(nn.Module):
    """encode: (I, n, P·P·C) patches and their timestep -> (I, n, dim); decode: (I, n, dim) -> (I, n, P·P·C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.timestep = TimestepEmbedding(config.patch_dim)
        self.input = nn.Linear(config.patch_dim, config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.patch_dim, bias=False)

    def encode(self, patches: Tensor, timestep: Tensor, token_image: Tensor | None = None) -> Tensor:
        """Noised patches (I, n, P·P·C), timestep (I,) in thousandths of the path -> (I, n, dim).

        Of images that differ in size, (T, P·P·C) and the image (T,) that each is of -> (T, dim).
        """
        embedded = self.timestep(timestep, patches.dtype)
        return self.input(patches + (embedded[:, None] if token_image is None else embedded[token_image]))

    def decode(self, hidden: Tensor) -> Tensor:
        """(I, n, dim) -> prediction (I, n, P·P·C), in the same patch order as the input."""
        return self.output(hidden)
