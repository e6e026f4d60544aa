"""What the kernels share: loads and stores of blocks of rows, visibility, and what a launch is specialised on.

Names: p_ pointer, BLOCK_Q × BLOCK_K the tile of scores, BLOCK_D the head dimension padded to a power of two. Padded
lanes are never read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels import tuning
from transfusion.kernels.mask_tiles.reference import HEADER, RUNS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MASKED_RUNS = tl.constexpr(HEADER)  # where a line of tiles holds its masked runs, and its full ones
FULL_RUNS = tl.constexpr(HEADER + 2 * RUNS)


@triton.jit
def load_rows(p_base, offsets, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows of D numbers at int64 `offsets`; rows not `inside` (where CHECK) and padded lanes give 0."""
    lanes = tl.arange(0, BLOCK_D)
    pointers = p_base + offsets[:, None] + lanes[None, :]
    if CHECK and BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=inside[:, None] & (lanes < HEAD_DIM)[None, :], other=0.0)
    if CHECK:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(lanes < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(p_base, offsets, inside, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """value, in the element type of p_base, to rows at int64 `offsets`; padded lanes are not written."""
    lanes = tl.arange(0, BLOCK_D)
    pointers = p_base + offsets[:, None] + lanes[None, :]
    tl.store(pointers, value.to(p_base.dtype.element_ty), mask=inside[:, None] & (lanes < HEAD_DIM)[None, :])


@triton.jit
def load_numbers(p_base, index, inside, CHECK: tl.constexpr):
    """Numbers at `index`; where CHECK those not `inside` are 0."""
    if CHECK:
        return tl.load(p_base + index, mask=inside, other=0.0)
    return tl.load(p_base + index)


@triton.jit
def load_intervals(p_intervals, keys, inside):
    """start, end of the keys' query intervals; a key not `inside` is seen by no query.

    One load of pairs: of fewer numbers than threads, as each half is, Triton 3.6 makes a load for every thread that
    wants them, 64 of them a tile.
    """
    pairs = tl.load(p_intervals + 2 * keys[:, None] + tl.arange(0, 2)[None, :], mask=inside[:, None], other=0)
    return tl.split(pairs)


@triton.jit
def is_visible(queries, start, end):
    """start <= query < end, of intervals with start <= end: at or past the one but not the other.

    Not by `&`: LLVM makes two selections of one by a conjunction, 64 instructions more in a tile of 128 × 128.
    """
    return (start <= queries) ^ (end <= queries)


@triton.jit
def exponential(x, PRECISION: tl.constexpr):
    """exp(x) of natural x in float32; else x is in units of log2, which spares a product for each score.

    That change of base rounds the scale and then lse: as much as all the rest of a float32 forward.
    """
    if PRECISION == "ieee":
        x = x * LOG2_E
    return tl.exp2(x)


@triton.jit
def probabilities(products, lse, scale, PRECISION: tl.constexpr):
    """exp(scale·products - lse), lse in the units of `exponential`: in 16 bits one multiply-add makes its argument."""
    if PRECISION == "ieee":
        return exponential(products * scale - lse, PRECISION)
    return exponential(products * (scale * LOG2_E) - lse, PRECISION)


def row_strides(intervals: Tensor, tiles: Tensor) -> tuple[int, int]:
    """Batch strides of the intervals and of the tiles: 0 where one row serves the whole batch."""
    return tuple(0 if t.shape[0] == 1 else t.stride(0) for t in (intervals, tiles))  # type: ignore[return-value]


def constexprs(launch: tuning.Launch, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are specialised on. Products of float32 are IEEE, not TF32, which would round the inputs."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tuning.padded_head_dim(head_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_K": launch.block_k,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def launch_options(launch: tuning.Launch, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """`constexprs` with warps and stages."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return constexprs(launch, head_dim, dtype) | options
