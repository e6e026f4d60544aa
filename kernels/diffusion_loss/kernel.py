"""loss[i] = weight[i]·mean((prediction[i] - target[i])²) and its gradient, one pass each: Triton kernels and launchers.

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

from transfusion.kernels.launching import launch
from transfusion.kernels.patchify_noise.kernel import (
    COMPILE_SHAPES,
    CompileCase,
    compile_case,
    grid_of,
    latent_strides,
    noised_tile,
    tile_of_program,
    token_strides,
    tokens_of_tile,
)
from transfusion.kernels.ragged_latents import Layout

_PARTIALS = 128  # sums that `mean_of_tiles_kernel` adds at once


@triton.jit
def elements_of_image(planes, image, elements, C: tl.constexpr):
    """C·h·w as a float; `elements` where every image has as many."""
    if planes is None:
        return elements
    else:
        return (tl.load(planes + image * 4 + 1) * C).to(tl.float32)


@triton.jit
def diffusion_loss_kernel(
    prediction, latents, data_weight, noise_weight, noise, seed, weight, grad_loss, result, planes, tiles,
    elements, width, num_pixels, stride_pi, stride_pn, stride_pf, stride_i, stride_c, stride_y, stride_x,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """result: a partial sum per program; or, where `grad_loss` is given, the gradient of the prediction.

    The gradient is divided by the number of elements with correct rounding, as the formula is.
    """
    image, first_pixel, num_pixels, channel, start, y, x, token, feature, mask = tile_of_program(
        planes, tiles, width, num_pixels, P, C, BLOCK_C, BLOCK_S, ALIGN
    )
    target = noised_tile(
        latents, data_weight, noise_weight, noise, seed, tiles, image, first_pixel, num_pixels, channel, start, y, x,
        mask, stride_i, stride_c, stride_y, stride_x, C, BLOCK_C, BLOCK_S, ALIGN,
    )  # fmt: skip
    pointers = tokens_of_tile(
        prediction, tiles, image, first_pixel, channel, token, feature, stride_pi, stride_pn, stride_pf, P
    )
    difference = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) - target
    if grad_loss is None:
        squares = tl.where(mask, difference * difference, 0.0)
        tl.store(result + tl.program_id(0), tl.sum(tl.sum(squares, 1), 0))
    else:
        scale = 2.0 * tl.load(grad_loss + image)
        if weight is not None:
            scale *= tl.load(weight + image)
        scale = tl.div_rn(scale, elements_of_image(planes, image, elements, C))
        place = token.to(tl.int64) * (P * P * C) + feature
        results = result + first_pixel * C + place[None, :] + channel[:, None]
        tl.store(results, (scale * difference).to(result.dtype.element_ty), mask=mask)


@triton.jit
def mean_of_tiles_kernel(
    partial, weight, planes, loss, elements, programs_per_image,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss[i] = weight[i]·(the sum of image i's partial sums, in a fixed order) / (C·h·w); a program per image."""
    blocks_of_channels: tl.constexpr = tl.cdiv(C, BLOCK_C)
    image = tl.program_id(0).to(tl.int64)
    if planes is None:
        first, count = image * programs_per_image, programs_per_image
    else:
        plane = planes + image * 4
        first = tl.load(plane + 3) * blocks_of_channels
        count = tl.cdiv(tl.load(plane + 1).to(tl.int32), BLOCK_S) * blocks_of_channels
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + first + place, mask=place < count, other=0.0)
    mean = tl.div_rn(tl.sum(total, 0), elements_of_image(planes, image, elements, C))
    if weight is not None:
        mean *= tl.load(weight + image)
    tl.store(loss + image, mean)


def forward(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> (I,) float32."""
    grid = grid_of(latents.shape, patch_size, layout)
    loss = latents.new_empty(data_weight.shape, dtype=torch.float32)
    if not grid.programs:
        return loss
    partial = latents.new_empty((grid.programs,), dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    _launch(prediction, latents, data_weight, noise_weight, noise, seed, None, None, partial, patch_size, layout)
    tile = {name: grid.constants[name] for name in ("C", "BLOCK_C", "BLOCK_S")}
    launch(
        mean_of_tiles_kernel, loss.shape[0],
        partial, weight, grid.where[0], loss, _elements(latents, layout), grid.programs_per_image,
        **tile, BLOCK=_PARTIALS, num_warps=1,
    )  # fmt: skip
    return loss


def backward(
    grad_loss: Tensor,
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> the gradient of `prediction`, its shape and dtype, contiguous."""
    grad = prediction.new_empty(prediction.shape)
    if grad.numel():
        given = (data_weight, noise_weight, noise, seed, weight, grad_loss.contiguous())
        _launch(prediction, latents, *given, grad, patch_size, layout)
    return grad


def _elements(latents: Tensor, layout: Layout | None) -> float | None:
    return float(math.prod(latents.shape[1:])) if layout is None else None


def _launch(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    result: Tensor,
    patch_size: int,
    layout: Layout | None,
) -> None:
    grid = grid_of(latents.shape, patch_size, layout)
    if layout is not None:
        latents = latents.contiguous()
    launch(
        diffusion_loss_kernel, grid.programs,
        prediction, latents, data_weight.contiguous(), noise_weight.contiguous(),
        None if noise is None else noise.contiguous(), seed, None if weight is None else weight.contiguous(),
        grad_loss, result, *grid.where, _elements(latents, layout), *grid.sizes,
        *token_strides(prediction, layout), *latent_strides(latents, layout), **grid.constants,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Representative launches on contiguous tensors, for ahead-of-time compilation."""
    for shape in COMPILE_SHAPES:
        common = dict.fromkeys(("data_weight", "noise_weight", "weight"), "*fp32") | shape.types | {"stride_pn": "i32"}
        if not shape.ragged:
            common |= {"elements": "fp32", "stride_pi": "i32", "programs_per_image": "i32"}
        constants = shape.constants | {"stride_pf": 1, "stride_x": None if shape.ragged else 1}
        for source in ({"seed": "*i64"}, {"noise": "*fp32"}):
            types = {"prediction": f"*{shape.element}", "latents": "*fp32", **common, **source}
            forward_types = {name: kind for name, kind in types.items() if name != "weight"}
            yield compile_case(diffusion_loss_kernel, {**forward_types, "result": "*fp32"}, constants, shape.divide)
            types |= {"grad_loss": "*fp32", "result": f"*{shape.element}"}
            yield compile_case(diffusion_loss_kernel, types, constants, shape.divide)
        types = {"partial": "*fp32", "loss": "*fp32", **common}
        yield compile_case(mean_of_tiles_kernel, types, constants | {"BLOCK": _PARTIALS}, False)
