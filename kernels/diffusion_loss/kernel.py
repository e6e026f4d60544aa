"""loss[i] = mean((prediction[i] - target[i])²) and its gradient, each in one pass: Triton kernels and launchers.

A program takes the tile of `patchify_noise`: BLOCK_C channels × BLOCK_S pixels of one image, target made in registers.
Forward writes one partial sum per tile, and the sums of an image are added in a second, fixed-order reduction: no
atomics, so the loss is bitwise the same each time. Backward makes the target again and writes the gradient.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels.patchify_noise.kernel import (
    COMPILE_SHAPES,
    CompileCase,
    compile_case,
    compile_constexprs,
    launch_parameters,
    noised_tile,
    num_programs,
    tile_of_program,
)


@triton.jit
def diffusion_loss_kernel(
    prediction, latents, data_weight, noise_weight, noise, seed, grad_loss, result, elements, width, num_pixels,
    stride_pi, stride_pn, stride_pf, stride_i, stride_c, stride_y, stride_x,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """result: a partial sum per program; or, where `grad_loss` is given, the gradient of the prediction.

    elements = C·h·w as a float, by which the gradient is divided with correct rounding, as the formula is.
    """
    image, channel, start, y, x, token, feature, mask = tile_of_program(width, num_pixels, P, C, BLOCK_C, BLOCK_S)
    target = noised_tile(
        latents, data_weight, noise_weight, noise, seed, image, channel, start, y, x, mask, num_pixels,
        stride_i, stride_c, stride_y, stride_x, C, BLOCK_C, BLOCK_S, QUADS,
    )  # fmt: skip
    columns = token.to(tl.int64) * stride_pn + feature.to(tl.int64) * stride_pf
    rows = prediction + image * stride_pi + channel.to(tl.int64) * stride_pf
    predicted = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    difference = predicted - target
    if grad_loss is None:
        squares = tl.where(mask, difference * difference, 0.0)
        tl.store(result + tl.program_id(0), tl.sum(tl.sum(squares, 1), 0))
    else:
        scale = tl.div_rn(2.0 * tl.load(grad_loss + image), elements)
        place = token.to(tl.int64) * (P * P * C) + feature
        pointers = result + image * num_pixels * C + place[None, :] + channel[:, None]
        tl.store(pointers, (scale * difference).to(result.dtype.element_ty), mask=mask)


def forward(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
) -> Tensor:
    """-> (I,) float32."""
    images, elements = latents.shape[0], math.prod(latents.shape[1:])
    if not images:
        return latents.new_empty(0, dtype=torch.float32)
    programs = num_programs(*_sizes(latents), launch_parameters(latents.shape[1]))
    partial = latents.new_empty((images, programs // images), dtype=torch.float32)
    _launch(prediction, latents, data_weight, noise_weight, noise, seed, None, partial, patch_size)
    return partial.sum(1) / elements


def backward(
    grad_loss: Tensor,
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
) -> Tensor:
    """-> the gradient of `prediction`, its shape and dtype, contiguous."""
    grad = prediction.new_empty(prediction.shape)
    if grad.numel():
        _launch(prediction, latents, data_weight, noise_weight, noise, seed, grad_loss.contiguous(), grad, patch_size)
    return grad


def _sizes(latents: Tensor) -> tuple[int, int, int]:
    images, channels, height, width = latents.shape
    return images, channels, height * width


def _launch(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    grad_loss: Tensor | None,
    result: Tensor,
    patch_size: int,
) -> None:
    images, channels, num_pixels = _sizes(latents)
    parameters = launch_parameters(channels)
    with torch.cuda.device_of(latents):
        diffusion_loss_kernel[(num_programs(images, channels, num_pixels, parameters),)](
            prediction, latents, data_weight.contiguous(), noise_weight.contiguous(),
            None if noise is None else noise.contiguous(), seed, grad_loss, result,
            float(channels * num_pixels), latents.shape[3], num_pixels,
            *prediction.stride(), *latents.stride(),
            P=patch_size, C=channels, QUADS=num_pixels % 4 == 0, **parameters,
        )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Representative launches on contiguous tensors, for ahead-of-time compilation."""
    sizes = ("width", "num_pixels", "stride_pi", "stride_pn", "stride_i", "stride_c", "stride_y")
    common = {"data_weight": "*fp32", "noise_weight": "*fp32", "elements": "fp32", **dict.fromkeys(sizes, "i32")}
    for element, channels, patch_size, quads, divide in COMPILE_SHAPES:
        constexprs = {**compile_constexprs(channels, patch_size), "stride_pf": 1, "stride_x": 1, "QUADS": quads}
        for source in ({"seed": "*i64"}, {"noise": "*fp32"}):
            types = {"prediction": f"*{element}", "latents": "*fp32", **common, **source}
            yield compile_case(diffusion_loss_kernel, {**types, "result": "*fp32"}, constexprs, divide)
            types |= {"grad_loss": "*fp32", "result": f"*{element}"}
            yield compile_case(diffusion_loss_kernel, types, constexprs, divide)
