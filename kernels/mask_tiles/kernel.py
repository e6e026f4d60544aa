"""Runs of masked and full tiles on the device: two launches for query tiles, one for key tiles, no host sync."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels.launching import launch
from transfusion.kernels.mask_tiles.reference import FEW, HEADER, RUNS, WIDTH

_RUNS, _HEADER, _FEW = tl.constexpr(RUNS), tl.constexpr(HEADER), tl.constexpr(FEW)
CHUNK = 128  # tiles that a program classifies at once


@triton.jit
def key_extremes_kernel(p_intervals, p_extremes, num_queries, num_keys, tiles, BLOCK_K: tl.constexpr):
    """min start, max start, min end, max end of each key tile, (B, 4, tiles). Grid: key tiles × B."""
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    p_intervals += 2 * (b * num_keys + keys)
    start = tl.load(p_intervals, mask=keys < num_keys, other=num_queries)
    end = tl.load(p_intervals + 1, mask=keys < num_keys, other=0)
    end = tl.where(start < num_queries, end, 0)  # an empty interval ends before every query
    p_extremes += b * 4 * tiles + tile
    tl.store(p_extremes, tl.min(start, 0))
    tl.store(p_extremes + tiles, tl.max(start, 0))
    tl.store(p_extremes + 2 * tiles, tl.min(end, 0))
    tl.store(p_extremes + 3 * tiles, tl.max(end, 0))


@triton.jit
def _kinds(p_extremes, index, first_query, past_query, tiles):
    """0 empty, 1 masked, 2 full, of key tiles `index` for queries [first_query, past_query)."""
    inside = (index >= 0) & (index < tiles)
    start_min = tl.load(p_extremes + index, mask=inside, other=2147483647)
    start_max = tl.load(p_extremes + tiles + index, mask=inside, other=0)
    end_min = tl.load(p_extremes + 2 * tiles + index, mask=inside, other=0)
    end_max = tl.load(p_extremes + 3 * tiles + index, mask=inside, other=0)
    nonempty = (start_min < past_query) & (end_max > first_query)
    full = nonempty & (start_max <= first_query) & (end_min >= past_query)
    return nonempty.to(tl.int32) + full.to(tl.int32)


@triton.jit
def query_tiles_kernel(
    p_extremes, p_tiles, num_queries, query_tiles, tiles, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr
):
    """The runs of one query tile. Grid: query tiles × B."""
    program = tl.program_id(0).to(tl.int64)
    p_extremes += program // query_tiles * 4 * tiles
    p_tiles += program * (_HEADER + 4 * _RUNS)
    first_query = (program % query_tiles).to(tl.int32) * BLOCK_Q
    past_query = tl.minimum(first_query + BLOCK_Q, num_queries)
    masked_tiles, full_tiles = 0, 0
    for chunk in range(0, tiles, CHUNK):
        kind = _kinds(p_extremes, chunk + tl.arange(0, CHUNK), first_query, past_query, tiles)
        masked_tiles += tl.sum((kind == 1).to(tl.int32), 0)
        full_tiles += tl.sum((kind == 2).to(tl.int32), 0)
    most = tl.where((full_tiles <= _FEW) & (masked_tiles > 0), 1, 2)  # a few full tiles are masked ones
    masked_begun, full_begun, masked_runs, full_runs, masked_count, count, end = 0, 0, 0, 0, 0, 0, 0
    tail = tiles  # where the first run begins that finds no place
    for chunk in range(0, tiles, CHUNK):
        index = chunk + tl.arange(0, CHUNK)
        kind = tl.minimum(_kinds(p_extremes, index, first_query, past_query, tiles), most)
        begins = kind != tl.minimum(_kinds(p_extremes, index - 1, first_query, past_query, tiles), most)
        ends = kind != tl.minimum(_kinds(p_extremes, index + 1, first_query, past_query, tiles), most)
        masked = masked_begun + tl.cumsum(((kind == 1) & begins).to(tl.int32), 0)
        full = full_begun + tl.cumsum(((kind == 2) & begins).to(tl.int32), 0)
        # The last place of the masked runs is for the rest.
        fits = (masked < _RUNS) & (full <= _RUNS)
        tail = tl.minimum(tail, tl.min(tl.where(fits, tiles, index), 0))
        slot = _HEADER + 2 * tl.where(kind == 1, masked - 1, full - 1 + _RUNS)
        fits &= kind != 0
        tl.store(p_tiles + slot, index, mask=fits & begins)
        tl.store(p_tiles + slot + 1, index + 1, mask=fits & ends)
        count += tl.sum(fits.to(tl.int32), 0)
        masked_count += tl.sum((fits & (kind == 1)).to(tl.int32), 0)
        end = tl.maximum(end, tl.max(tl.where(kind != 0, index + 1, 0), 0))
        masked_begun, full_begun = tl.max(masked, 0), tl.max(full, 0)
        masked_runs += tl.sum((fits & begins & (kind == 1)).to(tl.int32), 0)
        full_runs += tl.sum((fits & begins & (kind == 2)).to(tl.int32), 0)
    if tail < tiles:
        tl.store(p_tiles + _HEADER + 2 * masked_runs, tail)
        tl.store(p_tiles + _HEADER + 2 * masked_runs + 1, end)
        masked_runs += 1
        count += end - tail
        masked_count += end - tail
    tl.store(p_tiles, masked_runs)
    tl.store(p_tiles + 1, full_runs)
    tl.store(p_tiles + 2, count)
    tl.store(p_tiles + 3, masked_count)


@triton.jit
def key_tiles_kernel(p_intervals, p_tiles, num_queries, num_keys, tiles, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The runs of one key tile: masked, full, masked, for its keys' intervals are contiguous. Grid: key tiles × B.

    A query tile t is not empty where min start < (t + 1)·BLOCK_Q and max end > t·BLOCK_Q, and so on.
    """
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    p_intervals += 2 * (b * num_keys + keys)
    start = tl.load(p_intervals, mask=keys < num_keys, other=num_queries)
    end = tl.load(p_intervals + 1, mask=keys < num_keys, other=0)
    end = tl.where(start < num_queries, end, 0)  # an empty interval ends before every query
    end_min = tl.min(end, 0)
    first, last = tl.min(start, 0) // BLOCK_Q, tl.cdiv(tl.max(end, 0), BLOCK_Q)
    full_first = tl.minimum(tl.cdiv(tl.max(start, 0), BLOCK_Q), last)
    full_last = end_min // BLOCK_Q
    last = tl.maximum(first, last)
    alone = (first == full_first) & (full_last == last)
    has_full = (full_first < full_last) & (alone | (full_last - full_first > _FEW))
    full_first = tl.where(has_full, full_first, last)
    full_last = tl.where(has_full, full_last, last)
    before, after = (first < full_first).to(tl.int32), (full_last < last).to(tl.int32)
    p_tiles += tl.program_id(0).to(tl.int64) * (_HEADER + 4 * _RUNS)
    tl.store(p_tiles, before + after)
    tl.store(p_tiles + 1, has_full.to(tl.int32))
    tl.store(p_tiles + 2, last - first)
    tl.store(p_tiles + 3, last - first - (full_last - full_first))
    tl.store(p_tiles + _HEADER, first, mask=before > 0)
    tl.store(p_tiles + _HEADER + 1, full_first, mask=before > 0)
    tl.store(p_tiles + _HEADER + 2 * before, full_last, mask=after > 0)
    tl.store(p_tiles + _HEADER + 2 * before + 1, last, mask=after > 0)
    tl.store(p_tiles + _HEADER + 2 * _RUNS, full_first, mask=has_full)
    tl.store(p_tiles + _HEADER + 2 * _RUNS + 1, full_last, mask=has_full)


def query_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(N / block_q)·WIDTH) int32; places without a run hold anything."""
    batch, num_keys, _ = intervals.shape
    lines, tiles = -(-num_queries // block_q), -(-num_keys // block_k)
    extremes = torch.empty(batch, 4, tiles, dtype=torch.int32, device=intervals.device)
    result = torch.empty(batch, lines * WIDTH, dtype=torch.int32, device=intervals.device)
    launch(
        key_extremes_kernel, batch * tiles, intervals, extremes, num_queries, num_keys, tiles,
        BLOCK_K=block_k, num_warps=1,
    )  # fmt: skip
    launch(
        query_tiles_kernel, batch * lines, extremes, result, num_queries, lines, tiles,
        BLOCK_Q=block_q, CHUNK=CHUNK, num_warps=1,
    )  # fmt: skip
    return result


def key_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(M / block_k)·WIDTH) int32; places without a run hold anything."""
    batch, num_keys, _ = intervals.shape
    tiles = -(-num_keys // block_k)
    result = torch.empty(batch, tiles * WIDTH, dtype=torch.int32, device=intervals.device)
    launch(
        key_tiles_kernel, batch * tiles, intervals, result, num_queries, num_keys, tiles,
        BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=1,
    )  # fmt: skip
    return result
