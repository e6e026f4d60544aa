"""What `patchify_noise` and `diffusion_loss` ask of their arguments: each check names the value and the fix."""

from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.philox import check_seed
from transfusion.kernels.registry import triton_reasons


def reasons_by_dtype(
    *, device: torch.device, dtype: torch.dtype, others: tuple[torch.dtype, ...] = (), **call: Any
) -> list[str]:
    """`triton_reasons` for a call whose tensors have `dtype` and the dtypes of `others`."""
    reasons = (triton_reasons(device=device, dtype=each, **call) for each in (dtype, *others))
    return list(dict.fromkeys(reason for of_one in reasons for reason in of_one))


def check_latents(latents: Tensor, patch_size: int) -> None:
    """Raises unless `latents` are (I, C, h, w) floating point, none of C, h, w zero, and patches tile them."""
    if latents.ndim != 4:
        raise ValueError(f"latents must be (images, channels, height, width), got shape {tuple(latents.shape)}")
    if not latents.dtype.is_floating_point:
        raise TypeError(f"latents must be floating point, got {latents.dtype}")
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size} must be at least 1")
    _, channels, height, width = latents.shape
    if not (channels and height and width):
        raise ValueError(f"latents of shape {tuple(latents.shape)} have images without elements")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latents of {height}x{width} do not divide into patches of {patch_size}x{patch_size}; "
            "crop, resize or pad them to a multiple"
        )


def check_weights(op: str, latents: Tensor, **weights: Tensor) -> None:
    """Raises unless each of `weights` is (I,) float32 on the latents' device and asks for no gradient."""
    for name, weight in weights.items():
        if weight.shape != latents.shape[:1]:
            raise ValueError(f"{name} must have one value per image, ({latents.shape[0]},), got {tuple(weight.shape)}")
        if weight.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {weight.dtype}")
        check_device(latents, name, weight)
        refuse_gradient(op, name, weight)


def check_noise(op: str, latents: Tensor, noise: Tensor | None, seed: Tensor | None) -> None:
    """Raises unless exactly one is given: noise like the latents, or an int64 seed without dimensions."""
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"{op} takes exactly one of noise= and seed=, got {given}")
    if seed is not None:
        check_seed(seed)
        check_device(latents, "seed", seed)
    if noise is not None:
        if noise.shape != latents.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the latents {tuple(latents.shape)}")
        if not noise.dtype.is_floating_point:
            raise TypeError(f"noise must be floating point, got {noise.dtype}")
        check_device(latents, "noise", noise)
        refuse_gradient(op, "noise", noise)


def check_device(latents: Tensor, name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is on the latents' device."""
    if tensor.device != latents.device:
        raise ValueError(f"{name} is on {tensor.device}, the latents are on {latents.device}; move it with .to(...)")


def refuse_gradient(op: str, name: str, tensor: Tensor) -> None:
    """Raises where a gradient would be asked of `tensor`, for which the op has none."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but {op} gives it no gradient; pass {name}.detach()")
