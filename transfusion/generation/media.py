"""Pictures of any kind a user has, to and from what an autoencoder reads: PIL, files, tensors; and masks."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from transfusion.data.sources import decoding, upright_rgb
from transfusion.data.transforms import to_image, to_tensor, window
from transfusion.optional import require

if TYPE_CHECKING:
    from PIL import Image

OUTPUT_TYPES = ("pil", "pt", "latent")


def to_pixels(picture: Any, size: tuple[int, int]) -> Tensor:
    """A PIL image or a file, upright, on white, cropped and resized as in training, or a tensor (3, H, W) in [0, 1]
    that has `size` already -> (3, H, W) float32 in [-1, 1].

    Raises `ValueError` for a tensor of another size or a file that is no image, `TypeError` for anything else.
    """
    if isinstance(picture, Tensor):
        if tuple(picture.shape) != (3, *size) or not picture.dtype.is_floating_point:
            raise ValueError(
                f"an image tensor must be (3, {size[0]}, {size[1]}) floating point in [0, 1], the model's size or that "
                f"of height= and width=, got {tuple(picture.shape)} {picture.dtype}; resize it, or give a PIL image, "
                "which is cropped and resized"
            )
        if not (picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1):
            raise ValueError(
                f"an image tensor must lie in [0, 1], got {float(picture.min())} .. {float(picture.max())}"
            )
        return picture.float().cpu() * 2 - 1
    return to_tensor(upright_rgb(_opened(picture)), size[0] if size[0] == size[1] else size)


def to_unknown(mask: Any, picture: Any, size: tuple[int, int], latent_size: tuple[int, int]) -> Tensor:
    """A mask, white or 1 where to paint -> (1, h, w) bool. A latent is painted where any pixel of it is to be, however
    small in a large mask.

    mask: a PIL image or a file of the size of `picture`, whatever that is, and cropped with it, where what is
    transparent is not marked; or a tensor (H, W) in [0, 1] of `size`, in which what is left of the picture is meant.
    Raises `ValueError` for another size.
    """
    if isinstance(mask, Tensor):
        if tuple(mask.shape) != size:
            raise ValueError(
                f"a mask tensor must be ({size[0]}, {size[1]}) here, the model's size or that of height= and width=, "
                f"got {tuple(mask.shape)}"
            )
        if not (mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1):
            raise ValueError(f"a mask tensor must lie in [0, 1], got {float(mask.min())} .. {float(mask.max())}")
        white = mask.float().cpu()[None]
    else:
        upright = _upright(mask)
        shown = size[::-1] if isinstance(picture, Tensor) else _upright(picture).size
        if upright.size != shown:
            raise ValueError(
                f"the mask is {_by(upright.size)} pixels and its image {_by(shown)}, both upright; what it marks would "
                "not be what is painted: give a mask of the image's size"
            )
        left, top, right, bottom = window(upright.size, size)
        levels, seen = upright_rgb(_opened(mask)).convert("L"), upright.convert("RGBA").getchannel("A")
        marked = torch.from_numpy(np.array(levels) / 255 * (np.array(seen) / 255)).float()[None]
        white = marked[:, math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
    return functional.adaptive_max_pool2d(white, latent_size) >= 0.5


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _upright(picture: Any) -> "Image.Image":
    turned: Image.Image = require("PIL.ImageOps").exif_transpose(_opened(picture))
    return turned


def _opened(picture: Any) -> "Image.Image":
    pil = require("PIL.Image")
    if isinstance(picture, pil.Image):
        image: Image.Image = picture
        if not all(image.size):
            raise ValueError(f"an image of {_by(image.size)} pixels is empty")
        return image
    if not isinstance(picture, str | Path):
        raise TypeError(f"an image must be a PIL image, a path or a tensor (3, H, W), got {type(picture).__name__}")
    if not Path(picture).is_file():
        raise FileNotFoundError(f"{picture} does not exist, or is no file")
    with decoding(str(picture)):
        opened: Image.Image = pil.open(picture)
        opened.load()
    return opened


def from_pixels(pixels: Tensor, output_type: str) -> Any:
    """(I, 3, H, W) in [-1, 1] -> a list of PIL images, or for "pt" the tensor in [0, 1]."""
    if output_type == "pt":
        return (pixels.float() + 1) / 2
    return [to_image(image) for image in pixels]


def check_output_type(output_type: str) -> None:
    """Raises `ValueError` for an unknown one."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}")
