"""The contract of `patchify_noise`: checks, implementations, the custom ops and their gradient."""

from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.image_contract import (
    Latents,
    check_latents,
    check_noise,
    check_weights,
    define,
    register_op,
    token_shape,
    unwrap,
)
from transfusion.kernels.registry import choose, refuse_forward_mode

OP = register_op("patchify_noise")


def patchify_noise(
    latents: Latents,
    alpha: Tensor,
    sigma: Tensor,
    patch_size: int,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i],  'i c (y p) (x q) -> i (y x) (p q c)'.

    One pass over memory. With `seed` the noise is never stored: element e of the flat latents gets element e of
    `philox.randn(latents.shape, seed)`, whatever the block size, the grid and the patch size. With `patch_size=1`
    the tokens are the channels-last image.

    Args:
        latents: (I, C, h, w) float16, bfloat16, float32 or float64, any strides; h and w multiples of `patch_size`. Or
            `RaggedLatents`, images of different sizes.
        alpha: (I,) float32.
        sigma: (I,) float32.
        patch_size: P.
        noise: like the latents in shape, (E,) like the values of ragged ones, floating point; exactly one of `noise`
            and `seed` is given.
        seed: () int64 on the latents' device.
        dtype: of the tokens; default, the latents'.
        impl: "auto", "triton" or "reference".

    Returns:
        (I, (h/P)·(w/P), P·P·C) tokens, (Σ (h_i/P)·(w_i/P), P·P·C) of ragged latents, image after image; contiguous,
        computed in float32 (float64 for float64 latents), rounded once. Differentiable in the latents; backward keeps
        `alpha`. Bitwise deterministic.

    Raises:
        ValueError: a shape or device that does not fit, noise and seed both or neither, a gradient asked of
            `alpha`, `sigma` or `noise`.
        TypeError: a dtype that does not fit.
        RuntimeError: an explicit `impl` that cannot run here.
        NotImplementedError: forward-mode differentiation, torch.func.grad and vjp.
    """
    check_latents(latents, patch_size)
    check_weights("patchify_noise", latents, alpha=alpha, sigma=sigma)
    values, layout = unwrap(latents)
    check_noise("patchify_noise", values, noise, seed)
    refuse_forward_mode("patchify_noise", values, alpha, sigma, noise)
    dtype = values.dtype if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} is not a floating-point dtype")
    others = (dtype,) if noise is None else (dtype, noise.dtype)
    impl = choose(OP, impl, device=values.device, dtype=values.dtype, others=others)
    return _patchify_noise(values, alpha, sigma, noise, seed, dtype, *layout, patch_size, impl)


def _empty_tokens(latents: Tensor, *rest: Any) -> Tensor:
    dtype, planes, _, channels, _, patch_size, _ = rest[-7:]
    return latents.new_empty(token_shape(latents, planes, channels, patch_size), dtype=dtype)


_patchify_noise_backward = define(
    OP,
    "backward",
    "Tensor grad_tokens, Tensor alpha, SymInt[] latents_shape, ScalarType dtype",
    lambda grad_tokens, _, latents_shape, dtype, *rest: grad_tokens.new_empty(latents_shape, dtype=dtype),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latents, alpha, _, _, _, _, planes, tiles, *ctx.numbers = inputs
    ctx.save_for_backward(alpha, planes, tiles)
    ctx.latents_shape, ctx.latents_dtype = latents.shape, latents.dtype


def _backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
    alpha, planes, tiles = ctx.saved_tensors
    grad_latents = None
    if ctx.needs_input_grad[0]:
        grad_latents = _patchify_noise_backward(
            grad_tokens, alpha, ctx.latents_shape, ctx.latents_dtype, planes, tiles, *ctx.numbers
        )
    return grad_latents, *[None] * 11


_patchify_noise = define(
    OP,
    "forward",
    "Tensor latents, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? seed, ScalarType dtype",
    _empty_tokens,
    setup_context=_setup_context,
    backward=_backward,
)
