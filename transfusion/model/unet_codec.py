"""tokens = down(pixels, t);  prediction = up(hidden, t, skips): a U-Net whose middle is the transformer.

    level 0   h × w        conv ─ ResBlock × b ─┐                                    ┌─ ResBlock × (b + 1) ─ norm ─ conv
    level l   h/2^l × w/2^l     down ─ (ResBlock ─ attention) × b ─┐   ┌─ (ResBlock ─ attention) × (b + 1) ─ up ┘
    last      h/P × w/P                                       norm ─ linear ─ transformer ─ linear

The blocks are those of Dhariwal & Nichol 2021 (arXiv 2105.05233) and Saharia et al. 2022, with plain layer norm over
the channels of each pixel, and the timestep added between the convolutions, in the place of their adaptive norm
(arXiv 2408.11039, section 3.2). Activations are channels-last, (I, h, w, channels), throughout.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from transfusion.config import ModelConfig, UNetConfig
from transfusion.model.image_codec import TimestepEmbedding


class Skips(NamedTuple):
    """What the way up needs of the way down: the timestep embedding (I, 4·width), the sides (h, w) of the latents, and
    the activations after each convolution and block, in order; none of them without skip connections."""

    timestep: Tensor
    sides: tuple[int, int]
    features: tuple[Tensor, ...]

    def repeat(self, times: int) -> "Skips":
        """For the same images repeated `times` times."""
        features = tuple(each.repeat(times, 1, 1, 1) for each in self.features)
        return Skips(self.timestep.repeat(times, 1), self.sides, features)


class Conv(nn.Conv2d):
    """A square convolution of channels-last images, (I, h, w, C_in) -> (I, h', w', C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        """The view (I, C, h, w) of a contiguous x is in torch's channels-last memory format, and so is the result."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResBlock(nn.Module):
    """x -> shortcut(x) + close(silu(norm(open(silu(norm(x))) + W·silu(e(t)))))."""

    def __init__(self, channels_in: int, channels: int, timestep_dim: int, eps: float) -> None:
        super().__init__()
        self.open_norm = nn.LayerNorm(channels_in, eps)
        self.open = Conv(channels_in, channels, 3, padding=1)
        self.timestep = nn.Linear(timestep_dim, channels)
        self.close_norm = nn.LayerNorm(channels, eps)
        self.close = Conv(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels else nn.Linear(channels_in, channels)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x (I, h, w, C_in), timestep (I, timestep_dim) -> (I, h, w, C)."""
        shift = self.timestep(functional.silu(timestep))[:, None, None]
        inner = self.open(functional.silu(self.open_norm(x))) + shift
        return self.shortcut(x) + self.close(functional.silu(self.close_norm(inner)))


class PixelAttention(nn.Module):
    """x -> x + W·attention(norm(x)): every pixel of an image sees every other."""

    def __init__(self, channels: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.close = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(I, h, w, C) -> (I, h, w, C)."""
        heads = self.qkv(self.norm(x)).flatten(1, 2).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(*heads.chunk(3, dim=1))
        return x + self.close(attended.transpose(1, 2).flatten(2)).view_as(x)


class Stage(nn.Module):
    """A residual block, and attention after it where the level has it."""

    def __init__(self, channels_in: int, level: int, config: UNetConfig, eps: float) -> None:
        super().__init__()
        channels = config.deep_width if level else config.width
        self.block = ResBlock(channels_in, channels, 4 * config.width, eps)
        attends = config.attention and level > 0
        self.attention = PixelAttention(channels, config.head_dim, eps) if attends else nn.Identity()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x (I, h, w, C_in) -> (I, h, w, C)."""
        return self.attention(self.block(x, timestep))


class Up(nn.Module):
    """Twice the sides: each pixel repeated 2×2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(I, h, w, C) -> (I, 2·h, 2·w, C)."""
        return self.conv(x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


class UNetCodec(nn.Module):
    """encode: pixels (I, h·w, C) -> tokens (I, n, dim) and skips; decode: hidden (I, n, dim), skips -> (I, h·w, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        unet, eps, self.patch_size = config.unet, config.norm_eps, config.patch_size
        levels = range(config.patch_size.bit_length())
        widths = [unet.deep_width if level else unet.width for level in levels]
        self.skips = unet.skips
        self.timestep = TimestepEmbedding(4 * unet.width)
        self.input = Conv(config.latent_channels, unet.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        features = [unet.width]
        for level in levels:
            if level:
                self.down.append(Conv(widths[level - 1], widths[level], 3, stride=2, padding=1))
                features.append(widths[level])
            for _ in range(unet.blocks):
                self.down.append(Stage(features[-1], level, unet, eps))
                features.append(widths[level])
        self.token_norm = nn.LayerNorm(widths[-1], eps)
        self.to_token = nn.Linear(widths[-1], config.dim, bias=False)
        self.from_token = nn.Linear(config.dim, widths[-1], bias=False)
        channels = widths[-1]
        for level in reversed(levels):
            for _ in range(unet.blocks + 1):
                self.up.append(Stage(channels + (features.pop() if unet.skips else 0), level, unet, eps))
                channels = widths[level]
            if level:
                self.up.append(Up(channels))
        self.output_norm = nn.LayerNorm(unet.width, eps)
        self.output = Conv(unet.width, config.latent_channels, 3, padding=1)

    def encode(self, pixels: Tensor, timestep: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Skips]:
        """Noised pixels (I, h·w, C), timestep (I,) in thousandths of the path, sides (h, w), multiples of P."""
        height, width = sides
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {self.patch_size} a side")
        embedded = self.timestep(timestep, pixels.dtype)
        x = self.input(pixels.unflatten(1, sides))
        features = [x]
        for layer in self.down:
            x = layer(x, embedded) if isinstance(layer, Stage) else layer(x)
            features.append(x)
        tokens = self.to_token(self.token_norm(x)).flatten(1, 2)
        return tokens, Skips(embedded, sides, tuple(features) if self.skips else ())

    def decode(self, hidden: Tensor, skips: Skips) -> Tensor:
        """Hidden (I, n, dim) of the same images -> prediction (I, h·w, C)."""
        height, width = (side // self.patch_size for side in skips.sides)
        x = self.from_token(hidden).unflatten(1, (height, width))
        features = list(skips.features)
        for layer in self.up:
            if not isinstance(layer, Stage):
                x = layer(x)
                continue
            x = layer(torch.cat([x, features.pop()], dim=-1) if self.skips else x, skips.timestep)
        assert not features, "a skip connection was not read"
        return self.output(functional.silu(self.output_norm(x))).flatten(1, 2)
