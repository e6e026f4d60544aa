"""The contract of `diffusion_loss`: checks, implementations, the custom ops and their gradient."""

from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.patchify_noise.contract import (
    check_device,
    check_latents,
    check_noise,
    check_weights,
    reasons_by_dtype,
    refuse_gradient,
)
from transfusion.kernels.registry import Implementation, Op, backend, choose, refuse_forward_mode, register

OP = register(
    Op(
        name="diffusion_loss",
        implementations={
            "triton": Implementation("transfusion.kernels.diffusion_loss.kernel", reasons_by_dtype),
            "reference": Implementation("transfusion.kernels.diffusion_loss.reference"),
        },
        cuda_order=("triton", "reference"),
        other_order=("reference",),
    )
)


def diffusion_loss(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    patch_size: int,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """loss[i] = mean((prediction[i] - target[i])²), target = data_weight[i]·latents[i] + noise_weight[i]·noise[i].

    The target is brought into token order, 'i c (y p) (x q) -> i (y x) (p q c)', and never stored; with `seed` neither
    is the noise: forward and backward make it again, the same as `patchify_noise` and `philox.randn` with that seed.

    Args:
        prediction: (I, n, P·P·C) float16, bfloat16, float32 or float64, n = (h/P)·(w/P), any strides.
        latents: (I, C, h, w) floating point, any strides; h and w multiples of `patch_size`.
        data_weight: (I,) float32.
        noise_weight: (I,) float32.
        patch_size: P.
        noise: like the latents in shape, floating point; exactly one of `noise` and `seed` is given.
        seed: () int64 on the latents' device.
        impl: "auto", "triton" or "reference".

    Returns:
        (I,) float32 (float64 where the prediction or the latents are float64). Differentiable in `prediction`, whose
        gradient has its dtype; backward keeps the inputs. Forward and backward are bitwise deterministic.

    Raises:
        ValueError: a shape or device that does not fit, noise and seed both or neither, a gradient asked of
            `latents`, a weight or `noise`.
        TypeError: a dtype that does not fit.
        RuntimeError: an explicit `impl` that cannot run here.
        NotImplementedError: forward-mode differentiation.
    """
    check_latents(latents, patch_size)
    _check_prediction(prediction, latents, patch_size)
    check_weights("diffusion_loss", latents, data_weight=data_weight, noise_weight=noise_weight)
    check_noise("diffusion_loss", latents, noise, seed)
    refuse_gradient("diffusion_loss", "latents", latents)
    refuse_forward_mode("diffusion_loss", prediction, latents, data_weight, noise_weight, noise)
    others = (latents.dtype,) if noise is None else (latents.dtype, noise.dtype)
    impl = choose(OP, impl, device=latents.device, dtype=prediction.dtype, others=others)
    return _diffusion_loss(prediction, latents, data_weight, noise_weight, noise, seed, patch_size, impl)


def _check_prediction(prediction: Tensor, latents: Tensor, patch_size: int) -> None:
    images, channels, height, width = latents.shape
    tokens = (height // patch_size) * (width // patch_size)
    expected = (images, tokens, patch_size * patch_size * channels)
    if tuple(prediction.shape) != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}; latents {tuple(latents.shape)} in patches of "
            f"{patch_size}x{patch_size} make {expected}"
        )
    if not prediction.dtype.is_floating_point:
        raise TypeError(f"prediction must be floating point, got {prediction.dtype}")
    check_device(latents, "prediction", prediction)


@torch.library.custom_op("transfusion::diffusion_loss", mutates_args=())
def _diffusion_loss(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    impl: str,
) -> Tensor:
    loss: Tensor = backend(OP, impl).forward(prediction, latents, data_weight, noise_weight, noise, seed, patch_size)
    return loss


@_diffusion_loss.register_fake
def _(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    impl: str,
) -> Tensor:
    dtype = torch.float64 if torch.float64 in (prediction.dtype, latents.dtype) else torch.float32
    return prediction.new_empty(prediction.shape[:1], dtype=dtype)


@torch.library.custom_op("transfusion::diffusion_loss_backward", mutates_args=())
def _diffusion_loss_backward(
    grad_loss: Tensor,
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    impl: str,
) -> Tensor:
    grad_prediction: Tensor = backend(OP, impl).backward(
        grad_loss, prediction, latents, data_weight, noise_weight, noise, seed, patch_size
    )
    return grad_prediction


@_diffusion_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    impl: str,
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.patch_size, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    grad_prediction = _diffusion_loss_backward(grad_loss, *ctx.saved_tensors, ctx.patch_size, ctx.impl)
    return grad_prediction, None, None, None, None, None, None, None


_diffusion_loss.register_autograd(_backward, setup_context=_setup_context)
