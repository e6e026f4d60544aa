"""The contract of `diffusion_loss`: checks, implementations, the custom ops and their gradient."""

from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.image_contract import (
    Latents,
    check_latents,
    check_noise,
    check_tokens,
    check_weights,
    define,
    refuse_gradient,
    register_op,
    token_shape,
    unwrap,
)
from transfusion.kernels.registry import choose, refuse_forward_mode

OP = register_op("diffusion_loss")


def diffusion_loss(
    prediction: Tensor,
    latents: Latents,
    data_weight: Tensor,
    noise_weight: Tensor,
    patch_size: int,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    weight: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """loss[i] = weight[i]·mean((prediction[i] - target[i])²), target = data_weight·latents + noise_weight·noise.

    The target's weights are each image's own. It is brought into token order, 'i c (y p) (x q) -> i (y x) (p q c)', and
    never stored; with `seed` neither is the noise: forward and backward make it again, the same as `patchify_noise` and
    `philox.randn` with that seed.

    Args:
        prediction: (I, n, P·P·C) float16, bfloat16, float32 or float64, n = (h/P)·(w/P), any strides; (T, P·P·C) for
            ragged latents, image after image.
        latents: (I, C, h, w) floating point, any strides; h and w multiples of `patch_size`. Or `RaggedLatents`.
        data_weight: (I,) float32.
        noise_weight: (I,) float32.
        patch_size: P.
        noise: like the latents in shape, (E,) like the values of ragged ones, floating point; exactly one of `noise`
            and `seed` is given.
        seed: () int64 on the latents' device.
        weight: (I,) float32, of each image's error, such as `NoiseSchedule.min_snr_weight`; default, one.
        impl: "auto", "triton" or "reference".

    Returns:
        (I,) float32 (float64 where the prediction or the latents are float64). Differentiable in `prediction`, whose
        gradient has its dtype; backward keeps the inputs. Forward and backward are bitwise deterministic.

    Raises:
        ValueError: a shape or device that does not fit, noise and seed both or neither, a gradient asked of
            `latents`, a weight or `noise`.
        TypeError: a dtype that does not fit.
        RuntimeError: an explicit `impl` that cannot run here.
        NotImplementedError: forward-mode differentiation, torch.func.grad and vjp.
    """
    check_latents(latents, patch_size)
    values, layout = unwrap(latents)
    expected = token_shape(values, layout[0], layout[2], patch_size)
    check_tokens("prediction", prediction, values, expected, patch_size)
    optional = {} if weight is None else {"weight": weight}
    check_weights("diffusion_loss", latents, data_weight=data_weight, noise_weight=noise_weight, **optional)
    check_noise("diffusion_loss", values, noise, seed)
    refuse_gradient("diffusion_loss", "latents", latents)
    refuse_forward_mode("diffusion_loss", prediction, values, data_weight, noise_weight, noise, weight)
    others = (values.dtype,) if noise is None else (values.dtype, noise.dtype)
    impl = choose(OP, impl, device=values.device, dtype=prediction.dtype, others=others)
    return _diffusion_loss(
        prediction, values, data_weight, noise_weight, noise, seed, weight, *layout, patch_size, impl
    )


def _empty_loss(prediction: Tensor, latents: Tensor, data_weight: Tensor, *rest: Any) -> Tensor:
    dtype = torch.float64 if torch.float64 in (prediction.dtype, latents.dtype) else torch.float32
    return prediction.new_empty(data_weight.shape, dtype=dtype)


_ARGUMENTS = (
    "Tensor prediction, Tensor latents, Tensor data_weight, Tensor noise_weight, Tensor? noise, Tensor? seed, "
    "Tensor? weight"
)
_diffusion_loss_backward = define(
    OP,
    "backward",
    f"Tensor grad_loss, {_ARGUMENTS}",
    lambda _, prediction, *rest: prediction.new_empty(prediction.shape),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.numbers = inputs[9:]


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    grad_prediction = _diffusion_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.numbers)
    return grad_prediction, *[None] * 12


_diffusion_loss = define(OP, "forward", _ARGUMENTS, _empty_loss, setup_context=_setup_context, backward=_backward)
