"""From a picture to what an autoencoder reads, and back."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from transfusion.data.optional import require

if TYPE_CHECKING:
    from PIL import Image


def to_tensor(image: "Image.Image", size: int) -> Tensor:
    """The central square of `image`, resized to `size`×`size` -> (3, size, size) float32, 2·pixel/255 - 1."""
    if size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").resize(
        (size, size),
        resample=require("PIL.Image").Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_image(pixels: Tensor) -> "Image.Image":
    """(3, h, w) in [-1, 1] -> an RGB image; values outside are clamped."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"expected pixels of shape (3, h, w), got {tuple(pixels.shape)}")
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return require("PIL.Image").fromarray(levels.permute(1, 2, 0).cpu().numpy())


def check_image_size(size: int, downscale: int, patch_size: int) -> None:
    """Raises `ValueError` unless `size` pixels divide into patches of latents."""
    step = downscale * patch_size
    if size < 1 or size % step:
        nearest = max(step, round(size / step) * step)
        raise ValueError(
            f"image_size={size} does not divide into patches of {step} pixels "
            f"(patch_size {patch_size} x the autoencoder's downscale {downscale}); use e.g. {nearest}"
        )
