"""Image latents of different sizes in one flat buffer: element e of image i is values[C·Σ_{j<i} h_j·w_j + e].

Each image is contiguous (C, h_i, w_i). Because patches tile it exactly, its tokens (T, P·P·C) begin at the same flat
element as its latent, whatever the patch size P. Where every size is the same, the buffer is the dense (I, C, h, w)
tensor, flat; element e has the same noise in both forms.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.registry import check_tensor, whole
from transfusion.kernels.transfer import moved

TILE_ELEMENTS = 2048
MAX_TILE_CHANNELS = 16


def tile_shape(channels: int) -> tuple[int, int]:
    """Channels × consecutive pixels of one image that a program of the kernels takes.

    The channels are the next power of two of C, at most 16: enough for writes of tokens to fill whole runs of memory.
    """
    block_c = min(1 << (channels - 1).bit_length(), MAX_TILE_CHANNELS)
    return block_c, TILE_ELEMENTS // block_c


class Layout(NamedTuple):
    """Where the images of a ragged buffer lie, as the kernels read it.

    planes     (I, 4) int64   first pixel in the buffer, pixels h·w, width w, first tile
    tiles      (n, 2) int32   image and first pixel in the image of each tile of `tile_shape(channels)[1]` pixels
    channels   C
    alignment  largest divisor of 16 that divides every h·w
    """

    planes: Tensor
    tiles: Tensor
    channels: int
    alignment: int


class RaggedLatents:
    """I images of C channels and sizes of their own, one after the other in `values`. Immutable.

    Args:
        values: (E,) floating point, E = C·Σ h_i·w_i, each image contiguous (C, h_i, w_i).
        channels: C.
        sizes: (h_i, w_i) of each image, on the host.

    The index tensors are made here, once, on the values' device; `to` moves them along.

    Raises:
        ValueError: an empty image, or values of another length.
        TypeError: values that are not a floating point tensor, sizes that are no pairs.
    """

    def __init__(self, values: Tensor, channels: int, sizes: Sequence[tuple[int, int]]) -> None:
        check_tensor("values", values, " of all elements, one after the other")
        channels = whole("channels", channels, 1)
        sizes = tuple(_sides(size) for size in sizes)
        for height, width in sizes:
            if height < 1 or width < 1:
                raise ValueError(f"an image of {channels} channels and {height}x{width} pixels has no elements")
        expected = channels * sum(height * width for height, width in sizes)
        if tuple(values.shape) != (expected,):
            raise ValueError(
                f"values have shape {tuple(values.shape)}; {len(sizes)} images of {channels} channels and these sizes "
                f"have ({expected},) elements"
            )
        _check_floating(values)
        self.values = values
        self.sizes = sizes
        self.divisor = math.gcd(*(side for size in self.sizes for side in size)) if sizes else 0
        # made in inference mode, no backward could save them
        eager = not torch.compiler.is_compiling()
        with torch.inference_mode(False) if eager and torch.is_inference_mode_enabled() else nullcontext():
            self.layout = _layout(self.sizes, channels, values.device)

    @staticmethod
    def pack(images: Iterable[Tensor]) -> "RaggedLatents":
        """Images (C, h_i, w_i), at least one, of one dtype, device and C, copied into one buffer."""
        images = list(images)
        if not images:
            raise ValueError("there is no image to pack; give at least one")
        for image in images:
            check_tensor("an image", image, " (channels, height, width)")
        channels = {image.shape[0] for image in images if image.ndim == 3}
        if len(channels) != 1 or any(image.ndim != 3 for image in images):
            shapes = sorted({tuple(image.shape) for image in images})
            raise ValueError(f"images must be (channels, height, width) of one number of channels, got {shapes}")
        dtypes = sorted({str(image.dtype) for image in images})
        if len(dtypes) != 1:
            raise TypeError(f"images must be of one dtype, got {' and '.join(dtypes)}; cast them to one")
        devices = sorted({str(image.device) for image in images})
        if len(devices) != 1:
            raise ValueError(f"images must be on one device, got {' and '.join(devices)}; move them with .to(...)")
        values = torch.cat([image.reshape(-1) for image in images])
        return RaggedLatents(values, channels.pop(), [(image.shape[1], image.shape[2]) for image in images])

    @property
    def channels(self) -> int:
        """C."""
        return self.layout.channels

    @property
    def device(self) -> torch.device:
        """Where values and index tensors are."""
        return self.values.device

    def __len__(self) -> int:
        """I."""
        return self.layout.planes.shape[0]

    def with_values(self, values: Tensor) -> "RaggedLatents":
        """The same sizes around other values (E,). Raises `ValueError` where they are on another device."""
        if values.device != self.device:
            raise ValueError(
                f"values are on {values.device}, the sizes on {self.device}; use to({str(values.device)!r})"
            )
        return self._moved(values, self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RaggedLatents":
        """The same on `device`, see `transfer.moved`; in another dtype it is `with_values(values.to(dtype))`."""
        planes, tiles, *numbers = self.layout
        planes, tiles = (moved(tensor, device, non_blocking) for tensor in (planes, tiles))
        return self._moved(moved(self.values, device, non_blocking), Layout(planes, tiles, *numbers))

    def images(self) -> list[Tensor]:
        """The images (C, h_i, w_i), as views."""
        parts = self.values.split([self.channels * height * width for height, width in self.sizes])
        return [part.view(-1, *size) for part, size in zip(parts, self.sizes, strict=True)]

    def __repr__(self) -> str:
        kind = f"dtype={self.values.dtype}, device={str(self.device)!r}"
        return f"RaggedLatents(channels={self.channels}, sizes={self.sizes}, {kind})"

    def _moved(self, values: Tensor, layout: Layout) -> "RaggedLatents":
        if values.shape != self.values.shape:
            raise ValueError(f"values have shape {tuple(values.shape)}, this layout takes {tuple(self.values.shape)}")
        _check_floating(values)
        other = object.__new__(RaggedLatents)
        other.values, other.sizes, other.divisor, other.layout = values, self.sizes, self.divisor, layout
        return other


def _sides(size: Any) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise TypeError(f"sizes must be pairs (height, width), one for each image, got {size!r}") from None
    return whole("height", height), whole("width", width)


def _check_floating(values: Tensor) -> None:
    if not values.dtype.is_floating_point:
        raise TypeError(f"values must be floating point, got {values.dtype}")


def _layout(sizes: Sequence[tuple[int, int]], channels: int, device: torch.device) -> Layout:
    pixels = torch.tensor([height * width for height, width in sizes], dtype=torch.int64, device="cpu")
    width = torch.tensor([width for _, width in sizes], dtype=torch.int64, device="cpu")
    _, block = tile_shape(channels)
    count = (pixels + block - 1) // block
    first_tile = count.cumsum(0) - count
    total = sum(-(-height * width // block) for height, width in sizes)
    image = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), count, output_size=total)
    start = (torch.arange(total, device="cpu") - first_tile[image]) * block
    planes = torch.stack([pixels.cumsum(0) - pixels, pixels, width, first_tile], dim=1)
    tiles = torch.stack([image, start], dim=1).to(torch.int32)
    alignment = math.gcd(16, *(height * width for height, width in sizes))
    return Layout(planes.to(device), tiles.to(device), channels, alignment)


def token_sources(layout: Layout, patch_size: int, num_tokens: int) -> Tensor:
    """(T, P·P·C) int64: the index in `values` of each entry of each token, '(y x) (p q c)' within an image.

    Without a host sync: `num_tokens` is T.
    """
    first_pixel, pixels, width, _ = layout.planes.unbind(1)
    area = patch_size * patch_size
    device = layout.planes.device
    image = torch.repeat_interleave(pixels // area, output_size=num_tokens)
    token = torch.arange(num_tokens, device=device) - first_pixel[image] // area
    columns = width[image] // patch_size
    first = (token // columns * width[image] + token % columns) * patch_size
    p, q = (torch.arange(patch_size, device=device).view(shape) for shape in ((1, -1, 1, 1), (1, 1, -1, 1)))
    c = torch.arange(layout.channels, device=device)
    pixel = first.view(-1, 1, 1, 1) + p * width[image].view(-1, 1, 1, 1) + q
    base, plane = (part[image].view(-1, 1, 1, 1) for part in (first_pixel * layout.channels, pixels))
    return (base + c * plane + pixel).flatten(1)


def image_of_token(layout: Layout, patch_size: int, num_tokens: int) -> Tensor:
    """(T,) int64: which image each token is of. Without a host sync: `num_tokens` is T."""
    return torch.repeat_interleave(layout.planes[:, 1] // patch_size**2, output_size=num_tokens)


def image_of_element(layout: Layout, num_elements: int) -> Tensor:
    """(E,) int64: which image each element of `values` is of. Without a host sync: `num_elements` is E."""
    return torch.repeat_interleave(layout.planes[:, 1] * layout.channels, output_size=num_elements)
