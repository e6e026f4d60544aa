"""tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i]: the formula and its derivative, nothing else.

Computed in float32, in float64 where the latents are float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from transfusion.kernels.philox import randn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """'i c (y p) (x q) -> i (y x) (p q c)', contiguous."""
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
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> (I, n, P·P·C) `dtype`."""
    compute = torch.float64 if latents.dtype == torch.float64 else torch.float32
    if noise is None:
        assert seed is not None
        noise = randn(latents.shape, seed, dtype=compute)
    noised = _per_image(alpha, compute) * latents.to(compute) + _per_image(sigma, compute) * noise.to(compute)
    return patchify(noised, patch_size).to(dtype)


def backward(
    grad_tokens: Tensor, alpha: Tensor, latents_shape: Sequence[int], patch_size: int, dtype: torch.dtype
) -> Tensor:
    """grad_latents = alpha[i]·unpatchify(grad_tokens), (I, C, h, w) `dtype`."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grad = unpatchify(grad_tokens.to(compute), latents_shape, patch_size)
    return (_per_image(alpha, compute) * grad).to(dtype)


def _per_image(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).view(-1, 1, 1, 1)
