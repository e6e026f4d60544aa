"""The contract of `denoise_step`: checks, implementations and the custom op."""

from typing import TypeVar, cast

import torch
from torch import Tensor

from transfusion.kernels.image_contract import (
    Latents,
    check_device,
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
from transfusion.kernels.ragged_latents import RaggedLatents
from transfusion.kernels.registry import check_tensor, choose, refuse_forward_mode

OP = register_op("denoise_step")

NUM_COEFFICIENTS = 7

AnyLatents = TypeVar("AnyLatents", bound=Latents)


def denoise_step(
    prediction: Tensor,
    latents: AnyLatents,
    coefficients: Tensor,
    patch_size: int,
    *,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> AnyLatents:
    """next = a·x + b·g + d·clamp(p·x + q·g, ±limit) + c·z,  g = unpatchify(u + guidance[i]·(prediction - u)).

    One step of a sampler, guidance included, in one pass over memory: DDPM, DDIM and Euler are this line with
    coefficients of their own (`transfusion.diffusion.steps`). No gradient.

    Args:
        prediction: (I, n, P·P·C) floating point, n = (h/P)·(w/P), any strides; (T, P·P·C) for ragged latents.
        latents: x, (I, C, h, w) floating point, any strides; h and w multiples of `patch_size`. Or `RaggedLatents`.
        coefficients: (7,) float32 (a, b, d, c, p, q, limit) on the latents' device; read there, so that a captured
            graph serves every step. limit is inf where nothing is clipped.
        patch_size: P.
        unconditional: u, like the prediction; given together with `guidance`. Default: g is the prediction.
        guidance: (I,) float32; 1 is the prediction as it is.
        noise: z, like the latents in shape; at most one of `noise` and `seed`. Default: no noise, c is not read.
        seed: () int64 on the latents' device: z = philox.randn(shape, seed). Every step needs a seed of its own.
        impl: "auto", "triton" or "reference".

    Returns:
        The next latents, of the latents' kind and dtype, contiguous; computed in float32 (float64 for float64 latents),
        rounded once. Bitwise deterministic. A NaN in gives NaN out.

    Raises:
        ValueError: a shape or device that does not fit, guidance without unconditional or the other way round, noise
            and seed both, a gradient asked of anything.
        TypeError: a dtype that does not fit.
        RuntimeError: an explicit `impl` that cannot run here.
        NotImplementedError: forward-mode differentiation.
    """
    check_latents(latents, patch_size)
    values, layout = unwrap(latents)
    expected = token_shape(values, layout[0], layout[2], patch_size)
    check_tokens("prediction", prediction, values, expected, patch_size)
    if (unconditional is None) != (guidance is None):
        raise ValueError("guidance and unconditional belong together: give both, or neither")
    if unconditional is not None:
        check_tokens("unconditional", unconditional, values, expected, patch_size)
        refuse_gradient("denoise_step", "unconditional", unconditional)
    if guidance is not None:
        check_weights("denoise_step", latents, guidance=guidance)
    _check_coefficients(coefficients, values)
    if noise is not None or seed is not None:
        check_noise("denoise_step", values, noise, seed)
    refuse_gradient("denoise_step", "prediction", prediction)
    refuse_gradient("denoise_step", "latents", latents)
    refuse_forward_mode("denoise_step", prediction, values, coefficients, unconditional, guidance, noise)
    others = [values.dtype, *(tensor.dtype for tensor in (unconditional, noise) if tensor is not None)]
    impl = choose(OP, impl, device=values.device, dtype=prediction.dtype, others=tuple(others))
    result = _denoise_step(
        prediction, values, coefficients, unconditional, guidance, noise, seed, *layout, patch_size, impl
    )
    following = latents.with_values(result) if isinstance(latents, RaggedLatents) else result
    return cast(AnyLatents, following)


def _check_coefficients(coefficients: Tensor, latents: Tensor) -> None:
    check_tensor("coefficients", coefficients, f" ({NUM_COEFFICIENTS},) of float32")
    if tuple(coefficients.shape) != (NUM_COEFFICIENTS,):
        raise ValueError(f"coefficients must have shape ({NUM_COEFFICIENTS},), got {tuple(coefficients.shape)}")
    if coefficients.dtype != torch.float32:
        raise TypeError(f"coefficients must be float32, got {coefficients.dtype}")
    check_device(latents, "coefficients", coefficients)
    refuse_gradient("denoise_step", "coefficients", coefficients)


_denoise_step = define(
    OP,
    "forward",
    "Tensor prediction, Tensor latents, Tensor coefficients, Tensor? unconditional, Tensor? guidance, Tensor? noise, "
    "Tensor? seed",
    lambda prediction, latents, *rest: latents.new_empty(latents.shape),
)
