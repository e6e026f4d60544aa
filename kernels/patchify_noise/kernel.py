"""tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i] in one pass: Triton kernels and launchers.

One program takes a tile of BLOCK_C channels × BLOCK_S pixels of one image, pixels flat over (y, x). The tile is read
along pixels, the unit stride of latents, and written along channels, the unit stride of tokens; because every
channel of its pixels is in it, it writes whole runs of memory. A plane whose size is a multiple of 4 is cut into
quads, and each call of Philox yields the noise of one quad; any other plane calls it per element. ALIGN divides the
pixels of every plane: 16, or what is left of it.

`diffusion_loss` and `denoise_step` are built from the same `tile_of_program` and `noised_tile`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels.image_contract import token_shape
from transfusion.kernels.launching import launch
from transfusion.kernels.ragged_latents import Layout, tile_shape


@triton.jit
def box_muller(u1, u2):
    """(r·cos 2πu2, r·sin 2πu2), r = sqrt(-2·ln u1).

    tl.cos and tl.sin carry a double-precision branch for huge angles. Here the angle is u2 turns: quarter turns are
    counted off exactly, and the remaining eighth of a turn either way is Cephes' sinf and cosf polynomials, one ulp.

    Here and in what else this noise enters every fused product is written out: left to the compiler, which products of
    a sum it fuses depends on what stands around them, and kernels would differ in the last bit.
    """
    quarter = (4.0 * u2 + 0.5).to(tl.int32)
    x = (4.0 * u2 - quarter) * 1.5707963267948966
    z = x * x
    sin = tl.fma(x * z, tl.fma(z, tl.fma(z, -1.9515295891e-4, 8.3321608736e-3), -1.6666654611e-1), x)
    cos = tl.fma(z, tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3), 4.166664568298827e-2)
    cos = tl.fma(z * z, cos, tl.fma(z, -0.5, 1.0))
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1.0e-7)))
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, call):
    """Elements 4·call, ..., 4·call + 3 of the stream `seed`; `call` int64."""
    i0, i1, i2, i3 = tl.randint4x(seed, call)
    n0, n1 = box_muller(tl.uint_to_uniform_float(i0), tl.uint_to_uniform_float(i1))
    n2, n3 = box_muller(tl.uint_to_uniform_float(i2), tl.uint_to_uniform_float(i3))
    return n0, n1, n2, n3


@triton.jit
def noise_tile(noise, seed, first, mask, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, QUADS: tl.constexpr):
    """noise[first[c] + s]: (BLOCK_C, BLOCK_S) float32, loaded, or made from the seed where `noise` is None.

    With QUADS every `first` is a multiple of 4.
    """
    if noise is not None:
        element = first[:, None] + tl.arange(0, BLOCK_S)[None, :]
        return tl.load(noise + element, mask=mask, other=0.0).to(tl.float32)
    elif QUADS:
        call = (first // 4)[:, None] + tl.arange(0, BLOCK_S // 4)[None, :]
        n0, n1, n2, n3 = normals(tl.load(seed), call)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK_C, BLOCK_S])
    else:
        element = first[:, None] + tl.arange(0, BLOCK_S)[None, :]
        n0, n1, n2, n3 = normals(tl.load(seed), element >> 2)
        word = element & 3
        return tl.where(word < 2, tl.where(word == 0, n0, n1), tl.where(word == 2, n2, n3))


@triton.jit
def tile_of_program(
    planes, tiles, width, num_pixels,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """-> image and its first pixel in the batch (int64), width, num_pixels, channel (BLOCK_C,), start, y, x, token,
    feature (BLOCK_S,) and mask (BLOCK_C, BLOCK_S).

    Pixel start + s is (y[s], x[s]), and its channel c is entry feature[s] + c of token[s]: feature = (p·P + q)·C. A
    dense batch is counted out; where the images lie in a ragged one is read from `Layout`.
    """
    blocks_of_channels: tl.constexpr = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    if tiles is None:
        blocks_of_pixels = tl.cdiv(num_pixels, BLOCK_S)
        start = (program % blocks_of_pixels) * BLOCK_S
        block_of_channels = (program // blocks_of_pixels) % blocks_of_channels
        image = (program // (blocks_of_pixels * blocks_of_channels)).to(tl.int64)
        first_pixel = image * num_pixels
    else:
        block_of_channels = program % blocks_of_channels
        row = tiles + (program // blocks_of_channels) * 2
        image = tl.load(row).to(tl.int64)
        start = tl.multiple_of(tl.load(row + 1), BLOCK_S)
        plane = planes + image * 4
        first_pixel = tl.multiple_of(tl.load(plane), ALIGN)
        num_pixels = tl.multiple_of(tl.load(plane + 1).to(tl.int32), ALIGN)
        width = tl.load(plane + 2).to(tl.int32)
    channel = block_of_channels * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = start + tl.arange(0, BLOCK_S)
    y, x = pixel // width, pixel % width
    token = (y // P) * (width // P) + x // P
    feature = ((y % P) * P + x % P) * C
    mask = (channel < C)[:, None] & (pixel < num_pixels)[None, :]
    return image, first_pixel, num_pixels, channel, start, y, x, token, feature, mask


@triton.jit
def latent_tile(
    latents, tiles, image, first, channel, y, x, mask, stride_i, stride_c, stride_y, stride_x, BLOCK_S: tl.constexpr
):
    """The latents of a tile, (BLOCK_C, BLOCK_S) float32; `first` (BLOCK_C,): the tile's first element of a channel."""
    if tiles is None:
        rows = latents + image * stride_i + channel.to(tl.int64) * stride_c
        columns = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    else:
        rows, columns = latents + first, tl.arange(0, BLOCK_S)
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def noised_tile(
    latents, data_weight, noise_weight, noise, seed, tiles, image, first_pixel, num_pixels, channel, start, y, x, mask,
    stride_i, stride_c, stride_y, stride_x,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """data_weight[i]·latents[i] + noise_weight[i]·noise[i]: (BLOCK_C, BLOCK_S) float32."""
    first = first_pixel * C + channel * num_pixels + start
    data = latent_tile(
        latents, tiles, image, first, channel, y, x, mask, stride_i, stride_c, stride_y, stride_x, BLOCK_S
    )
    drawn = noise_tile(noise, seed, first, mask, BLOCK_C, BLOCK_S, ALIGN % 4 == 0)
    return tl.fma(tl.load(noise_weight + image), drawn, tl.load(data_weight + image) * data)


@triton.jit
def patchify_noise_kernel(
    latents, alpha, sigma, noise, seed, planes, tiles, tokens, width, num_pixels,
    stride_i, stride_c, stride_y, stride_x,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i]."""
    image, first_pixel, num_pixels, channel, start, y, x, token, feature, mask = tile_of_program(
        planes, tiles, width, num_pixels, P, C, BLOCK_C, BLOCK_S, ALIGN
    )
    noised = noised_tile(
        latents, alpha, sigma, noise, seed, tiles, image, first_pixel, num_pixels, channel, start, y, x, mask,
        stride_i, stride_c, stride_y, stride_x, C, BLOCK_C, BLOCK_S, ALIGN,
    )  # fmt: skip
    place = token.to(tl.int64) * (P * P * C) + feature
    pointers = tokens + first_pixel * C + place[None, :] + channel[:, None]
    tl.store(pointers, noised.to(tokens.dtype.element_ty), mask=mask)


@triton.jit
def patchify_noise_backward_kernel(
    grad_tokens, alpha, planes, tiles, grad_latents, width, num_pixels, stride_i, stride_n, stride_f,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """grad_latents[i] = alpha[i]·unpatchify(grad_tokens[i])."""
    image, first_pixel, num_pixels, channel, start, _y, _x, token, feature, mask = tile_of_program(
        planes, tiles, width, num_pixels, P, C, BLOCK_C, BLOCK_S, ALIGN
    )
    pointers = tokens_of_tile(
        grad_tokens, tiles, image, first_pixel, channel, token, feature, stride_i, stride_n, stride_f, P
    )
    grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    first = first_pixel * C + channel * num_pixels + start
    results = grad_latents + first[:, None] + tl.arange(0, BLOCK_S)[None, :]
    tl.store(results, (tl.load(alpha + image) * grad).to(grad_latents.dtype.element_ty), mask=mask)


@triton.jit
def tokens_of_tile(
    tokens, tiles, image, first_pixel, channel, token, feature, stride_i, stride_n, stride_f, P: tl.constexpr
):
    """Pointers (BLOCK_C, BLOCK_S) to the tile in tokens (I, n, P·P·C), or (T, P·P·C) of ragged latents, by strides."""
    base = image * stride_i if tiles is None else (first_pixel // (P * P)) * stride_n
    rows = tokens + base + channel.to(tl.int64) * stride_f
    columns = token.to(tl.int64) * stride_n + feature.to(tl.int64) * stride_f
    return rows[:, None] + columns[None, :]


class Grid(NamedTuple):
    """How the kernels of a batch are launched: programs of all images and of one (dense only), what says where the
    images lie, and the tile."""

    programs: int
    programs_per_image: int
    where: tuple[Tensor | None, Tensor | None]
    sizes: tuple[int | None, int | None]
    constants: dict[str, int]


def grid_of(shape: Sequence[int], patch_size: int, layout: Layout | None) -> Grid:
    """For latents of `shape`, (I, C, h, w), or (E,) with their layout."""
    channels = shape[1] if layout is None else layout.channels
    block_c, block_s = tile_shape(channels)
    blocks = -(-channels // block_c)
    constants = {"P": patch_size, "C": channels, "BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": 4}
    if layout is None:
        images, _, height, width = shape
        num_pixels = height * width
        each = blocks * -(-num_pixels // block_s)
        constants["ALIGN"] = math.gcd(num_pixels, 16)
        return Grid(images * each, each, (None, None), (width, num_pixels), constants)
    constants["ALIGN"] = layout.alignment
    return Grid(layout.tiles.shape[0] * blocks, 0, (layout.planes, layout.tiles), (None, None), constants)


def latent_strides(latents: Tensor, layout: Layout | None) -> tuple[int | None, ...]:
    """Of image, channel, y and x, by which a dense batch is read; ragged values are contiguous."""
    return latents.stride() if layout is None else (None,) * 4


def token_strides(tokens: Tensor, layout: Layout | None) -> tuple[int | None, ...]:
    """Of image, token and feature of tokens (I, n, P·P·C); (T, P·P·C) of ragged latents have none of an image."""
    return tokens.stride() if layout is None else (None, *tokens.stride())


def forward(
    latents: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    dtype: torch.dtype,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> (I, n, P·P·C) or (T, P·P·C) `dtype`. Given noise is read in the latents' element order, so a strided one is
    copied."""
    grid = grid_of(latents.shape, patch_size, layout)
    planes = None if layout is None else layout.planes
    tokens = latents.new_empty(token_shape(latents, planes, grid.constants["C"], patch_size), dtype=dtype)
    if not grid.programs:
        return tokens
    if layout is not None:
        latents = latents.contiguous()
    launch(
        patchify_noise_kernel, grid.programs,
        latents, alpha.contiguous(), sigma.contiguous(), None if noise is None else noise.contiguous(), seed,
        *grid.where, tokens, *grid.sizes, *latent_strides(latents, layout), **grid.constants,
    )  # fmt: skip
    return tokens


def backward(
    grad_tokens: Tensor,
    alpha: Tensor,
    latents_shape: Sequence[int],
    dtype: torch.dtype,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """grad_latents = alpha[i]·unpatchify(grad_tokens), (I, C, h, w) or (E,) `dtype`, contiguous."""
    grad_latents = grad_tokens.new_empty(tuple(latents_shape), dtype=dtype)
    grid = grid_of(latents_shape, patch_size, layout)
    if not grid.programs:
        return grad_latents
    launch(
        patchify_noise_backward_kernel, grid.programs,
        grad_tokens, alpha.contiguous(), *grid.where, grad_latents, *grid.sizes, *token_strides(grad_tokens, layout),
        **grid.constants,
    )  # fmt: skip
    return grad_latents


CompileCase = tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]


def compile_case(kernel: Any, types: dict[str, str], constexprs: dict[str, Any], sizes_divide: bool) -> CompileCase:
    """(kernel, signature, constexprs, attrs) for `ASTSource`, as the launcher specialises them.

    Pointers are multiples of 16, as torch allocates them; with `sizes_divide` so are sizes and strides.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: constexprs.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = [i for i, kind in enumerate(signature.values()) if kind[0] == "*" or (sizes_divide and kind == "i32")]
    return kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned}


class CompileShape(NamedTuple):
    """A launch to compile: whether sizes and strides are multiples of 16, whether the batch is ragged, and `ALIGN`."""

    element: str
    channels: int
    patch_size: int
    divide: bool
    alignment: int
    ragged: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """P, C, the tile and its alignment."""
        block_c, block_s = tile_shape(self.channels)
        tile = {"BLOCK_C": block_c, "BLOCK_S": block_s, "ALIGN": self.alignment}
        return {"P": self.patch_size, "C": self.channels, **tile}

    @property
    def types(self) -> dict[str, str]:
        """Of what says where the images lie."""
        if self.ragged:
            return {"planes": "*i64", "tiles": "*i32"}
        return dict.fromkeys(("width", "num_pixels", "stride_i", "stride_c", "stride_y"), "i32")


# The paper's 32x32x8 latents, one by one and ragged, pixels, planes that are no multiple of 16 or of 4.
COMPILE_SHAPES = (
    CompileShape("bf16", 8, 2, True, 16),
    CompileShape("bf16", 8, 2, True, 16, ragged=True),
    CompileShape("fp32", 16, 1, True, 4, ragged=True),
    CompileShape("fp32", 3, 8, True, 16),
    CompileShape("fp16", 5, 1, False, 1),
    CompileShape("fp16", 5, 1, False, 1, ragged=True),
)


def compile_cases() -> Iterator[CompileCase]:
    """Representative launches on contiguous tensors, for ahead-of-time compilation."""
    for shape in COMPILE_SHAPES:
        pointer = f"*{shape.element}"
        common = {"alpha": "*fp32", "sigma": "*fp32", **shape.types}
        constants = shape.constants | {"stride_x": None if shape.ragged else 1, "stride_f": 1}
        for source in ({"seed": "*i64"}, {"noise": pointer}):
            types = {"latents": pointer, "tokens": pointer, **common, **source}
            yield compile_case(patchify_noise_kernel, types, constants, shape.divide)
        types = {"grad_tokens": pointer, "grad_latents": pointer, "stride_n": "i32", **common}
        yield compile_case(patchify_noise_backward_kernel, types, constants, shape.divide)
