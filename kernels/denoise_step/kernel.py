"""One step of a sampler, from tokens and latents to the next latents, in one pass: the Triton kernel and its launcher.

A program takes the tile of `patchify_noise` the other way round: tokens are read along channels, latents read and
written along pixels.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels.launching import launch
from transfusion.kernels.patchify_noise.kernel import (
    COMPILE_SHAPES,
    CompileCase,
    compile_case,
    grid_of,
    latent_strides,
    latent_tile,
    noise_tile,
    tile_of_program,
    token_strides,
    tokens_of_tile,
)
from transfusion.kernels.ragged_latents import Layout


@triton.jit
def denoise_step_kernel(
    prediction, latents, coefficients, unconditional, guidance, noise, seed, result, planes, tiles, width, num_pixels,
    stride_pi, stride_pn, stride_pf, stride_ui, stride_un, stride_uf, stride_i, stride_c, stride_y, stride_x,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """next = a·x + b·g + d·clamp(p·x + q·g, ±limit) + c·z; coefficients are (a, b, d, c, p, q, limit)."""
    image, first_pixel, num_pixels, channel, start, y, x, token, feature, mask = tile_of_program(
        planes, tiles, width, num_pixels, P, C, BLOCK_C, BLOCK_S, ALIGN
    )
    pointers = tokens_of_tile(
        prediction, tiles, image, first_pixel, channel, token, feature, stride_pi, stride_pn, stride_pf, P
    )
    guided = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if unconditional is not None:
        pointers = tokens_of_tile(
            unconditional, tiles, image, first_pixel, channel, token, feature, stride_ui, stride_un, stride_uf, P
        )
        base = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        guided = tl.fma(tl.load(guidance + image), guided - base, base)
    first = first_pixel * C + channel * num_pixels + start
    data = latent_tile(
        latents, tiles, image, first, channel, y, x, mask, stride_i, stride_c, stride_y, stride_x, BLOCK_S
    )
    limit = tl.load(coefficients + 6)
    estimate = tl.fma(tl.load(coefficients + 5), guided, tl.load(coefficients + 4) * data)
    estimate = tl.minimum(tl.maximum(estimate, -limit), limit)
    following = tl.fma(tl.load(coefficients + 1), guided, tl.load(coefficients) * data)
    following = tl.fma(tl.load(coefficients + 2), estimate, following)
    if noise is not None or seed is not None:
        drawn = noise_tile(noise, seed, first, mask, BLOCK_C, BLOCK_S, ALIGN % 4 == 0)
        following = tl.fma(tl.load(coefficients + 3), drawn, following)
    pointers = result + first[:, None] + tl.arange(0, BLOCK_S)[None, :]
    tl.store(pointers, following.to(result.dtype.element_ty), mask=mask)


def forward(
    prediction: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> like the latents, (I, C, h, w) or (E,), contiguous."""
    result = latents.new_empty(latents.shape)
    grid = grid_of(latents.shape, patch_size, layout)
    if not grid.programs:
        return result
    if layout is not None:
        latents = latents.contiguous()
    launch(
        denoise_step_kernel, grid.programs,
        prediction, latents, coefficients.contiguous(), unconditional,
        None if guidance is None else guidance.contiguous(), None if noise is None else noise.contiguous(), seed,
        result, *grid.where, *grid.sizes, *token_strides(prediction, layout),
        *token_strides(prediction if unconditional is None else unconditional, layout),
        *latent_strides(latents, layout), **grid.constants,
    )  # fmt: skip
    return result


def compile_cases() -> Iterator[CompileCase]:
    """Representative launches on contiguous tensors, for ahead-of-time compilation: guided, deterministic and not."""
    for shape in COMPILE_SHAPES:
        common = {"latents": "*fp32", "result": "*fp32", "coefficients": "*fp32", "guidance": "*fp32", **shape.types}
        common |= dict.fromkeys(("stride_pn", "stride_un"), "i32")
        if not shape.ragged:
            common |= dict.fromkeys(("stride_pi", "stride_ui"), "i32")
        constants = shape.constants | {"stride_pf": 1, "stride_uf": 1, "stride_x": None if shape.ragged else 1}
        for source in ({}, {"seed": "*i64"}):
            types = dict.fromkeys(("prediction", "unconditional"), f"*{shape.element}") | common | source
            yield compile_case(denoise_step_kernel, types, constants, shape.divide)
