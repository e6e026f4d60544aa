"""tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i]: the formula and its derivative, nothing else.

Computed in float32, in float64 where the latents are float64. A ragged buffer is brought into token order by the index
of each entry, and back by the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from transfusion.kernels.philox import randn
from transfusion.kernels.ragged_latents import Layout, RaggedLatents, image_of_token, token_sources


def patchify(images: Tensor | RaggedLatents, patch_size: int) -> Tensor:
    """'i c (y p) (x q) -> i (y x) (p q c)', contiguous; (T, P·P·C) of ragged ones, image after image."""
    if isinstance(images, RaggedLatents):
        _, source = _image_and_source(images.layout, patch_size, len(images.values))
        return images.values[source]
    count, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(count, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(count, rows * columns, patch_size * patch_size * channels).contiguous()


def unpatchify(tokens: Tensor, shape: Sequence[int], patch_size: int) -> Tensor:
    """'i (y x) (p q c) -> i c (y p) (x q)' with `shape` = (I, C, h, w), contiguous: the inverse of `patchify`."""
    count, channels, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    patches = tokens.reshape(count, rows, columns, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(count, channels, height, width).contiguous()


def forward(
    latents: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    dtype: torch.dtype,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> (I, n, P·P·C) `dtype`; (T, P·P·C) for the values (E,) of ragged latents."""
    compute = torch.float64 if latents.dtype == torch.float64 else torch.float32
    if noise is None:
        assert seed is not None
        noise = randn(latents.shape, seed, dtype=compute)
    data, noise, alpha, sigma = (each.to(compute) for each in (latents, noise, alpha, sigma))
    if layout is None:
        noised = alpha.view(-1, 1, 1, 1) * data + sigma.view(-1, 1, 1, 1) * noise
        return patchify(noised, patch_size).to(dtype)
    image, source = _image_and_source(layout, patch_size, len(latents))
    return (alpha[image] * data[source] + sigma[image] * noise[source]).to(dtype)


def backward(
    grad_tokens: Tensor,
    alpha: Tensor,
    latents_shape: Sequence[int],
    dtype: torch.dtype,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """grad_latents = alpha[i]·unpatchify(grad_tokens), (I, C, h, w) or (E,) `dtype`."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grad, alpha = grad_tokens.to(compute), alpha.to(compute)
    if layout is None:
        return (alpha.view(-1, 1, 1, 1) * unpatchify(grad, latents_shape, patch_size)).to(dtype)
    image, source = _image_and_source(layout, patch_size, latents_shape[0])
    values = torch.empty(tuple(latents_shape), dtype=dtype, device=grad.device)
    values[source] = (alpha[image] * grad).to(dtype)
    return values


def _image_and_source(layout: Layout, patch_size: int, elements: int) -> tuple[Tensor, Tensor]:
    """(T, 1) image and (T, P·P·C) index in the buffer of the entries of each token."""
    num_tokens = elements // (patch_size * patch_size * layout.channels)
    return image_of_token(layout, patch_size, num_tokens)[:, None], token_sources(layout, patch_size, num_tokens)
