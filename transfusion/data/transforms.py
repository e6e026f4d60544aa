"""From a picture to what an autoencoder reads, and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from transfusion.optional import require

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""(height, width) in pixels."""


def to_tensor(image: "Image.Image", size: int | Size) -> Tensor:
    """The largest centred part of `image` of the shape of `size`, resized to it -> `from_levels` of its pixels."""
    return from_levels(crop(image, size))


def crop(image: "Image.Image", size: int | Size) -> np.ndarray:
    """The largest centred part of `image` that has the shape of `size`, resized to it -> (height, width, 3) uint8."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size}")
    if image.mode == "RGB" and image.size == (width, height):
        return np.array(image)
    resized = image.convert("RGB").resize(
        (width, height), resample=require("PIL.Image").Resampling.LANCZOS, box=window(image.size, (height, width))
    )
    return np.array(resized)


def window(shown: tuple[int, int], size: Size) -> tuple[float, float, float, float]:
    """Of a picture (width, height) the largest centred part of the shape of `size`: left, top, right, bottom."""
    height, width = size
    # the larger of the two scales covers the target; what sticks out is cut on both sides alike
    scale = min(shown[0] / width, shown[1] / height)
    left, top = (shown[0] - width * scale) / 2, (shown[1] - height * scale) / 2
    if height == width:  # whole pixels, as a square cut has them
        left, top = float(int(left)), float(int(top))
    return left, top, min(left + width * scale, shown[0]), min(top + height * scale, shown[1])


def from_levels(levels: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (3, height, width) float32, 2·level/255 - 1."""
    planes = torch.from_numpy(levels).permute(2, 0, 1)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_image(pixels: Tensor) -> "Image.Image":
    """(3, h, w) in [-1, 1] -> an RGB image; values outside are clamped."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"expected pixels of shape (3, h, w), got {tuple(pixels.shape)}")
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return require("PIL.Image").fromarray(levels.permute(1, 2, 0).cpu().numpy())


def check_image_size(size: int, downscale: int, patch_size: int, name: str = "image_size") -> None:
    """Raises `ValueError`, naming the nearest that fits, unless `size` pixels divide into patches of latents."""
    step = downscale * patch_size
    if size < 1 or size % step:
        nearest = max(step, round(size / step) * step)
        raise ValueError(
            f"{name}={size} does not divide into patches of {step} pixels "
            f"(patch_size {patch_size} x the autoencoder's downscale {downscale}); use e.g. {nearest}"
        )


def bucket_sizes(aspect_ratios: Sequence[str], image_size: int, step: int) -> list[Size]:
    """For each ratio "WIDTH:HEIGHT" the size in multiples of `step` that has it best, of about image_size² pixels.

    No ratio at all means one size, the square. Raises `ValueError` naming a ratio that is malformed.
    """
    sizes = []
    for ratio in aspect_ratios or ("1:1",):
        width, _, height = ratio.partition(":")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise ValueError(f'an aspect ratio is "WIDTH:HEIGHT" such as "4:3", got {ratio!r}')
        scale = (int(width) / int(height)) ** 0.5
        sizes.append(tuple(max(step, round(side / step) * step) for side in (image_size / scale, image_size * scale)))
    return sizes


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size of `sizes` (height, width) whose aspect ratio is closest to width:height, the first of equal ones."""
    shapes = np.log([w / h for h, w in sizes])
    return sizes[int(np.abs(shapes - np.log(width / height)).argmin())]
