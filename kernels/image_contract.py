"""What the ops on images share: their registration, and checks of arguments that name the value and the fix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transfusion.kernels import dispatch
from transfusion.kernels.philox import check_seed
from transfusion.kernels.ragged_latents import Layout, RaggedLatents
from transfusion.kernels.registry import Implementation, Op, backend, check_tensor, register, triton_reasons

Latents = Tensor | RaggedLatents
PlainLayout = tuple[Tensor | None, Tensor | None, int, int]


def reasons_by_dtype(
    *, device: torch.device, dtype: torch.dtype, others: tuple[torch.dtype, ...] = (), **call: Any
) -> list[str]:
    """`triton_reasons` for a call whose tensors have `dtype` and the dtypes of `others`."""
    reasons = (triton_reasons(device=device, dtype=each, **call) for each in (dtype, *others))
    return list(dict.fromkeys(reason for of_one in reasons for reason in of_one))


def register_op(name: str) -> Op:
    """The op of the package `name`, with a Triton kernel and a reference."""
    package = f"transfusion.kernels.{name}"
    implementations = {
        "triton": Implementation(f"{package}.kernel", reasons_by_dtype),
        "reference": Implementation(f"{package}.reference"),
    }
    return register(Op(name, implementations, cuda_order=("triton", "reference"), other_order=("reference",)))


_LAYOUT = "Tensor? planes, Tensor? tiles, SymInt channels, SymInt alignment, SymInt patch_size, str impl"


def define(op: Op, stage: str, arguments: str, fake: Callable[..., Tensor], **autograd: Callable[..., Any]) -> Any:
    """The dispatcher's op that runs `stage`, "forward" or "backward", of the module that its argument `impl` names.

    Args:
        op: whose stage it is.
        stage: a function (*arguments, patch_size, layout) of each implementation.
        arguments: in torch's schema language; the op takes a plain layout, patch_size and impl after them.
        fake: like the op, an empty result.
        autograd: setup_context and backward, of what can be differentiated.
    """

    def run(*call: Any) -> Tensor:
        *own, planes, tiles, channels, alignment, patch_size, impl = call
        layout = None if planes is None else Layout(planes, tiles, channels, alignment)
        result: Tensor = getattr(backend(op, impl), stage)(*own, patch_size, layout)
        return result

    name = op.name if stage == "forward" else f"{op.name}_{stage}"
    return dispatch.define(name, f"({arguments}, {_LAYOUT}) -> Tensor", run, fake, **autograd)


def unwrap(latents: Latents) -> tuple[Tensor, PlainLayout]:
    """The tensor of the latents, (I, C, h, w) or (E,), and a layout as an op takes it: plain tensors and numbers."""
    if isinstance(latents, RaggedLatents):
        layout = latents.layout
        return latents.values, (layout.planes, layout.tiles, layout.channels, layout.alignment)
    return latents, (None, None, latents.shape[1], 0)


def token_shape(latents: Tensor, planes: Tensor | None, channels: int, patch_size: int) -> tuple[int, ...]:
    """(I, n, P·P·C), or (T, P·P·C) of ragged ones."""
    features = patch_size * patch_size * channels
    if planes is not None:
        return latents.shape[0] // features, features
    images, _, height, width = latents.shape
    return images, (height // patch_size) * (width // patch_size), features


def check_latents(latents: Latents, patch_size: int) -> None:
    """Raises unless `latents` are ragged, or floating point (I, C, h, w) not empty, and patches tile every image."""
    if not hasattr(patch_size, "__index__"):
        raise TypeError(f"patch_size={patch_size!r} must be a whole number")
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size} must be at least 1")
    if isinstance(latents, RaggedLatents):
        if latents.divisor % patch_size:
            uneven = (size for size in latents.sizes if size[0] % patch_size or size[1] % patch_size)
            _refuse_size(*next(uneven), patch_size)
        return
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor or RaggedLatents, got {type(latents).__name__}")
    if latents.ndim != 4:
        raise ValueError(f"latents must be (images, channels, height, width), got shape {tuple(latents.shape)}")
    if not latents.dtype.is_floating_point:
        raise TypeError(f"latents must be floating point, got {latents.dtype}")
    _, channels, height, width = latents.shape
    if not (channels and height and width):
        raise ValueError(f"latents of shape {tuple(latents.shape)} have images without elements")
    if height % patch_size or width % patch_size:
        _refuse_size(height, width, patch_size)


def _refuse_size(height: int, width: int, patch_size: int) -> None:
    raise ValueError(
        f"latents of {height}x{width} do not divide into patches of {patch_size}x{patch_size}; "
        "crop, resize or pad them to a multiple"
    )


def check_tokens(name: str, tokens: Tensor, latents: Tensor, expected: tuple[int, ...], patch_size: int) -> None:
    """Raises unless `tokens` are floating point of the `expected` shape (`token_shape`), on the latents' device."""
    check_tensor(name, tokens, " of patches")
    if tuple(tokens.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(tokens.shape)}; latents {tuple(latents.shape)} in patches of "
            f"{patch_size}x{patch_size} make {expected}"
        )
    if not tokens.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tokens.dtype}")
    check_device(latents, name, tokens)


def check_weights(op: str, latents: Latents, **weights: Tensor) -> None:
    """Raises unless each of `weights` is (I,) float32 on the latents' device and asks for no gradient."""
    images = len(latents) if isinstance(latents, RaggedLatents) else latents.shape[0]
    for name, weight in weights.items():
        if isinstance(weight, int | float):
            raise TypeError(
                f"{name} must be a tensor of one float32 for each image, got {type(weight).__name__}; "
                f"torch.full(({images},), {float(weight)}) is the same one for all"
            )
        check_tensor(name, weight, " of one float32 for each image")
        if weight.ndim != 1 or weight.shape[0] != images:
            raise ValueError(f"{name} must have one value per image, ({images},), got {tuple(weight.shape)}")
        if weight.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {weight.dtype}")
        check_device(latents, name, weight)
        refuse_gradient(op, name, weight)


def check_noise(op: str, latents: Tensor, noise: Tensor | None, seed: Tensor | None) -> None:
    """Raises unless exactly one is given: noise like the latents' tensor, or an int64 seed without dimensions."""
    if (noise is None) == (seed is None):
        given = "got neither" if noise is None else "not both"
        raise ValueError(f"{op} takes one of noise= and seed=, {given}")
    if seed is not None:
        check_seed(seed)
        check_device(latents, "seed", seed)
    if noise is not None:
        if isinstance(noise, RaggedLatents):
            raise TypeError("noise is RaggedLatents; pass the tensor, noise.values")
        check_tensor("noise", noise, " like the latents")
        if noise.shape != latents.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the latents {tuple(latents.shape)}")
        if not noise.dtype.is_floating_point:
            raise TypeError(f"noise must be floating point, got {noise.dtype}")
        check_device(latents, "noise", noise)
        refuse_gradient(op, "noise", noise)


def check_device(latents: Latents, name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is on the latents' device."""
    if tensor.device != latents.device:
        raise ValueError(f"{name} is on {tensor.device}, the latents are on {latents.device}; move it with .to(...)")


def refuse_gradient(op: str, name: str, given: Latents) -> None:
    """Raises where a gradient would be asked of the argument `name`, for which the op has none."""
    tensor, cure = given, f"{name}.detach()"
    if isinstance(tensor, RaggedLatents):
        tensor, cure = tensor.values, f"{name}.with_values({name}.values.detach())"
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but {op} gives it no gradient; pass {cure}")
