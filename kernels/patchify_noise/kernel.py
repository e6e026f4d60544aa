"""tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i] in one pass: Triton kernels and launchers.

One program takes a tile of BLOCK_C channels × BLOCK_S pixels of one image, pixels flat over (y, x). The tile is read
along pixels, the unit stride of latents, and written along channels, the unit stride of tokens; because every
channel of its pixels is in it, it writes whole runs of memory. A plane whose size is a multiple of 4 is cut into
quads, and each call of Philox yields the noise of one quad; any other plane calls it per element.

`diffusion_loss` is built from the same `tile_of_program` and `noised_tile`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def box_muller(u1, u2):
    """(r·cos 2πu2, r·sin 2πu2), r = sqrt(-2·ln u1).

    tl.cos and tl.sin carry a double-precision branch for huge angles. Here the angle is u2 turns: quarter turns are
    counted off exactly, and the remaining eighth of a turn either way is Cephes' sinf and cosf polynomials, one ulp.
    """
    quarter = (4.0 * u2 + 0.5).to(tl.int32)
    x = (4.0 * u2 - quarter) * 1.5707963267948966
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
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
def tile_of_program(width, num_pixels, P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """-> image (int64), channel (BLOCK_C,), start, y, x, token, feature (BLOCK_S,) and mask (BLOCK_C, BLOCK_S).

    Pixel start + s is (y[s], x[s]), and its channel c is entry feature[s] + c of token[s]: feature = (p·P + q)·C.
    """
    program = tl.program_id(0)
    blocks_of_pixels = tl.cdiv(num_pixels, BLOCK_S)
    start = (program % blocks_of_pixels) * BLOCK_S
    block_of_channels = (program // blocks_of_pixels) % tl.cdiv(C, BLOCK_C)
    image = (program // (blocks_of_pixels * tl.cdiv(C, BLOCK_C))).to(tl.int64)
    channel = block_of_channels * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = start + tl.arange(0, BLOCK_S)
    y, x = pixel // width, pixel % width
    token = (y // P) * (width // P) + x // P
    feature = ((y % P) * P + x % P) * C
    mask = (channel < C)[:, None] & (pixel < num_pixels)[None, :]
    return image, channel, start, y, x, token, feature, mask


@triton.jit
def noised_tile(
    latents, data_weight, noise_weight, noise, seed, image, channel, start, y, x, mask, num_pixels,
    stride_i, stride_c, stride_y, stride_x,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """data_weight[i]·latents[i] + noise_weight[i]·noise[i]: (BLOCK_C, BLOCK_S) float32."""
    rows = latents + image * stride_i + channel.to(tl.int64) * stride_c
    columns = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    data = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    first = (image * C + channel) * num_pixels + start
    drawn = noise_tile(noise, seed, first, mask, BLOCK_C, BLOCK_S, QUADS)
    return tl.load(data_weight + image) * data + tl.load(noise_weight + image) * drawn


@triton.jit
def patchify_noise_kernel(
    latents, alpha, sigma, noise, seed, tokens, width, num_pixels,
    stride_i, stride_c, stride_y, stride_x,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i]."""
    image, channel, start, y, x, token, feature, mask = tile_of_program(width, num_pixels, P, C, BLOCK_C, BLOCK_S)
    noised = noised_tile(
        latents, alpha, sigma, noise, seed, image, channel, start, y, x, mask, num_pixels,
        stride_i, stride_c, stride_y, stride_x, C, BLOCK_C, BLOCK_S, QUADS,
    )  # fmt: skip
    place = token.to(tl.int64) * (P * P * C) + feature
    pointers = tokens + image * num_pixels * C + place[None, :] + channel[:, None]
    tl.store(pointers, noised.to(tokens.dtype.element_ty), mask=mask)


@triton.jit
def patchify_noise_backward_kernel(
    grad_tokens, alpha, grad_latents, width, num_pixels, stride_i, stride_n, stride_f,
    P: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """grad_latents[i] = alpha[i]·unpatchify(grad_tokens[i])."""
    image, channel, start, _y, _x, token, feature, mask = tile_of_program(width, num_pixels, P, C, BLOCK_C, BLOCK_S)
    columns = token.to(tl.int64) * stride_n + feature.to(tl.int64) * stride_f
    rows = grad_tokens + image * stride_i + channel.to(tl.int64) * stride_f
    grad = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    first = (image * C + channel) * num_pixels + start
    pointers = grad_latents + first[:, None] + tl.arange(0, BLOCK_S)[None, :]
    tl.store(pointers, (tl.load(alpha + image) * grad).to(grad_latents.dtype.element_ty), mask=mask)


def launch_parameters(channels: int) -> dict[str, int]:
    """Tile of 2048 elements with as many of the channels, at most 16, as one run of memory in the tokens needs."""
    block_c = min(triton.next_power_of_2(channels), 16)
    return {"BLOCK_C": block_c, "BLOCK_S": 2048 // block_c, "num_warps": 4}


def num_programs(images: int, channels: int, num_pixels: int, parameters: dict[str, int]) -> int:
    """Size of the one-dimensional grid: images × channel blocks × pixel blocks."""
    return images * triton.cdiv(channels, parameters["BLOCK_C"]) * triton.cdiv(num_pixels, parameters["BLOCK_S"])


def forward(
    latents: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> (I, n, P·P·C) `dtype`. Given noise is read in the latents' element order, so a strided one is copied."""
    images, channels, height, width = latents.shape
    num_pixels = height * width
    tokens = latents.new_empty((images, num_pixels // patch_size**2, patch_size**2 * channels), dtype=dtype)
    if not images:
        return tokens
    parameters = launch_parameters(channels)
    with torch.cuda.device_of(latents):
        patchify_noise_kernel[(num_programs(images, channels, num_pixels, parameters),)](
            latents, alpha.contiguous(), sigma.contiguous(), None if noise is None else noise.contiguous(), seed,
            tokens, width, num_pixels, *latents.stride(),
            P=patch_size, C=channels, QUADS=num_pixels % 4 == 0, **parameters,
        )  # fmt: skip
    return tokens


def backward(
    grad_tokens: Tensor, alpha: Tensor, latents_shape: Sequence[int], patch_size: int, dtype: torch.dtype
) -> Tensor:
    """grad_latents = alpha[i]·unpatchify(grad_tokens), (I, C, h, w) `dtype`, contiguous."""
    images, channels, height, width = latents_shape
    grad_latents = grad_tokens.new_empty(tuple(latents_shape), dtype=dtype)
    if not images:
        return grad_latents
    parameters = launch_parameters(channels)
    with torch.cuda.device_of(grad_tokens):
        patchify_noise_backward_kernel[(num_programs(images, channels, height * width, parameters),)](
            grad_tokens, alpha.contiguous(), grad_latents, width, height * width, *grad_tokens.stride(),
            P=patch_size, C=channels, **parameters,
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


# (element type, C, P, h·w % 4 == 0, sizes are multiples of 16): the paper's 32x32x8 latents, pixels, and an odd size.
COMPILE_SHAPES = (("bf16", 8, 2, True, True), ("fp32", 3, 8, True, True), ("fp16", 5, 1, False, False))


def compile_constexprs(channels: int, patch_size: int) -> dict[str, int]:
    """P, C and the tile of a launch."""
    tile = {name: size for name, size in launch_parameters(channels).items() if name.startswith("BLOCK")}
    return {"P": patch_size, "C": channels, **tile}


def compile_cases() -> Iterator[CompileCase]:
    """Representative launches on contiguous tensors, for ahead-of-time compilation."""
    weights = {"alpha": "*fp32", "sigma": "*fp32"}
    sizes = dict.fromkeys(("width", "num_pixels", "stride_i", "stride_c", "stride_y", "stride_n"), "i32")
    for element, channels, patch_size, quads, divide in COMPILE_SHAPES:
        constexprs = {**compile_constexprs(channels, patch_size), "stride_x": 1, "stride_f": 1, "QUADS": quads}
        for source in ({"seed": "*i64"}, {"noise": f"*{element}"}):
            types = {"latents": f"*{element}", "tokens": f"*{element}", **weights, **source, **sizes}
            yield compile_case(patchify_noise_kernel, types, constexprs, divide)
        types = {"grad_tokens": f"*{element}", "grad_latents": f"*{element}", **weights, **sizes}
        yield compile_case(patchify_noise_backward_kernel, types, constexprs, divide)
