"""noise[e] = word e % 4 of BoxMuller(Philox4x32-10(counter = e // 4, key = seed)): noise that need not be stored.

Every element of the stream is a function of its index and the seed alone, so any part of it can be made again,
anywhere, in any order. Plain torch, on any device; the kernels make the same numbers (`patchify_noise/kernel.py`).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Uniforms and the Box-Muller transform
are those of `triton.language.randn4x`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Largest float32 s with (2^31 - 1)·s < 1, so that a uniform is never 1.
_UNIFORM_SCALE = 4.6566127342e-10
# Smallest uniform that meets the logarithm: |noise| <= sqrt(-2·ln 1e-7) = 5.68.
_UNIFORM_MIN = 1.0e-7


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox-4x32: four 32-bit words of output for four of counter and two of key.

    All words are int64 tensors with values in [0, 2^32); shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(c0, _MULTIPLIERS[0])
        high_b, low_b = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product, which wraps in int64 but keeps all its 64 bits."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def uniform(word: Tensor) -> Tensor:
    """32-bit word -> float32 in [0, 1): its absolute value as a signed number (of -x, x - 1), scaled."""
    return torch.where(word > _MASK >> 1, _MASK - word, word).to(torch.float32) * _UNIFORM_SCALE


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """(r·cos 2πu2, r·sin 2πu2) with r = sqrt(-2·ln u1): two uniforms -> two independent normals."""
    radius, angle = torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def randn(
    shape: Sequence[int],
    seed: Tensor,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Elements [offset, offset + numel) of the stream `seed`, as a contiguous tensor of `shape`.

    `seed`: () int64, the 64-bit key, read on its device without a host sync. Computed in float32, as the kernels
    do, and cast to `dtype`; float64 carries the same uniforms through Box-Muller without float32 rounding.
    `device` defaults to the seed's. Raises `TypeError` or `ValueError` for another kind of seed or a negative offset.
    """
    check_seed(seed)
    if offset < 0:
        raise ValueError(f"offset={offset} is negative: the stream starts at element 0")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} is not a floating-point dtype")
    seed = seed if device is None else seed.to(device)
    count = math.prod(shape)
    first = offset // 4
    call = torch.arange(first, (offset + count + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(call)
    words = philox4x32((call & _MASK, call >> 32, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    u1, u2, u3, u4 = (uniform(word) for word in words)
    normals = [
        *box_muller(u1.clamp(min=_UNIFORM_MIN).to(compute), u2.to(compute)),
        *box_muller(u3.clamp(min=_UNIFORM_MIN).to(compute), u4.to(compute)),
    ]
    stream = torch.stack(normals, dim=-1).flatten()
    return stream[offset - 4 * first :][:count].reshape(tuple(shape)).to(dtype)


def check_seed(seed: Tensor) -> None:
    """Raises unless `seed` is an int64 tensor without dimensions."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        kind = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed must be an int64 tensor, got {kind}; use torch.tensor(seed, device=...)")
    if seed.ndim:
        raise ValueError(f"seed must be a tensor without dimensions, got shape {tuple(seed.shape)}")
