"""dk, dv of `gradients.py` for Hopper, in Gluon: warps that copy beside warps that multiply.

Roles, rings of places, barriers and the order of blocks are those of `warp_specialised.py`. A consumer owns 64 keys;
queries, their gradients, lse and δ are streamed past them, of each query head of the group in turn. Scores have keys
for rows, so that p and ds are operands of products as they lie in registers:

    scores_t = k q_tᵀ     dp_t = v grad_out_tᵀ                            issued, and while dp runs
    p_t   =  exp2(scores_t - lse_t)
    dv   +=  p_t grad_out_t                                               issued, and while it runs
    ds_t  =  p_t ∘ (dp_t - δ_t)
    dk   +=  ds_t q_t                                                     issued and awaited

What the other consumer has issued runs meanwhile. Numbers are those of `gradients.py` in 16 bits, operation by
operation.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel.blocks import LOG2_E, MASKED_RUNS, row_strides
from transfusion.kernels.attention.kernel.specialised_blocks import (
    ROWS,
    SECTION_BYTES,
    allocate,
    constexprs,
    describe,
    describe_numbers,
    no_items,
    place,
    produce,
    products,
    store_rows,
    told,
)
from transfusion.kernels.launching import launch
from transfusion.kernels.mask_tiles.reference import WIDTH


@gluon.jit
def _step(
    dk, dv, n, first_query, k_rows, v_rows, rings, bars, start, end, exponent,
    S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dk and dv with the n-th tile, of queries from first_query on, which a full tile need not know."""
    q_ring, go_ring, lse_ring, delta_ring = rings
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_Q: gl.constexpr = q_ring.shape[1]
    dtype: gl.constexpr = q_ring.dtype
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S)
    at = n % STAGES
    mbarrier.wait(bars.index(at), n // STAGES & 1)
    scores, dp = products(k_rows, q_ring.index(at), S), products(v_rows, go_ring.index(at), S)
    scores = warpgroup_mma_wait(1, deps=[scores])
    lse = lse_ring.index(at).reshape([BLOCK_Q]).load(COLUMNS)
    p = gl.exp2(scores * exponent - gl.expand_dims(lse, 0))
    if MASKED:  # so is every tile with a query that sees nothing, whose p is infinite here, or past the end
        queries = gl.expand_dims(first_query + gl.arange(0, BLOCK_Q, COLUMNS), 0)
        p = gl.where((start <= queries) ^ (end <= queries), p, 0.0)
    dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P), go_ring.index(at), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = delta_ring.index(at).reshape([BLOCK_Q]).load(COLUMNS)
    ds = p * (dp - gl.expand_dims(delta, 0))
    dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), P), q_ring.index(at), dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(bars.index(STAGES + at))
    return dk, dv, n + 1


@gluon.jit
def _consume(
    tiles,
    rings,
    block_bars,
    bars,
    feed,
    work,
    mask,
    results,
    group,
    scale,
    HALF: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """dk and dv of one half of each block's rows."""
    items, heads, _order, _lines = work
    p_intervals, mask_b, num_keys = mask
    p_dk, p_dv, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n = results
    PLACES: gl.constexpr = tiles[0].shape[0]
    BLOCK_K: gl.constexpr = tiles[0].shape[1]
    BLOCK_Q: gl.constexpr = rings[0].shape[1]
    BLOCK_D: gl.constexpr = rings[0].shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    dtype: gl.constexpr = rings[0].dtype
    exponent = scale * LOG2_E
    n = 0
    count = 0
    item, masked_tiles, tile_count = told(0, feed)
    while item < items:
        head, block, line = place(item, work, False)
        masked_runs = gl.load(line)
        first_row = block * BLOCK_K + HALF * ROWS
        keys = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, S))
        p_pairs = p_intervals + gl.cast(head // heads, gl.int64) * mask_b + 2 * keys
        start = gl.expand_dims(gl.load(p_pairs, mask=keys < num_keys, other=0), 1)
        end = gl.expand_dims(gl.load(p_pairs + 1, mask=keys < num_keys, other=0), 1)
        dk = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        dv = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        held = count % PLACES
        mbarrier.wait(block_bars.index(held), count // PLACES & 1)
        k_rows = tiles[0].index(held).slice(HALF * ROWS, ROWS, 0)
        v_rows = tiles[1].index(held).slice(HALF * ROWS, ROWS, 0)
        if tile_count > 0:
            for _ in range(group):
                for run in range(masked_runs):
                    p_run = line + MASKED_RUNS + 2 * run
                    for tile in range(gl.load(p_run), gl.load(p_run + 1)):
                        dk, dv, n = _step(
                            dk, dv, n, tile * BLOCK_Q, k_rows, v_rows, rings, bars, start, end, exponent, S, P, True
                        )
                for _ in range(tile_count - masked_tiles):
                    dk, dv, n = _step(dk, dv, n, 0, k_rows, v_rows, rings, bars, start, end, exponent, S, P, False)
        mbarrier.arrive(block_bars.index(PLACES + held))
        b, h = gl.cast(head // heads, gl.int64), gl.cast(head % heads, gl.int64)
        store_rows(p_dk + b * dk_b + h * dk_h, dk_n, first_row, num_keys, (dk * scale).to(dtype), HEAD_DIM)
        store_rows(p_dv + b * dv_b + h * dv_h, dv_n, first_row, num_keys, dv.to(dtype), HEAD_DIM)
        count += 1
        item, masked_tiles, tile_count = told(count, feed)


@gluon.jit
def specialised_key_kernel(
    k_desc, v_desc, q_desc, go_desc, lse_desc, delta_desc, p_dk, p_dv, p_intervals, p_tiles, p_next,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, mask_b, tiles_b, tiles_n, batch, heads, group, num_keys, scale, section,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk, dv of every block of keys, summed over the heads of its group in order; `heads` are those of keys.

    Grid: as many programs as stay on the device, at most. Descriptors: blocks (1, 1, BLOCK_K or BLOCK_Q, BLOCK_D) of
    k, v, q and grad_out, and (1, BLOCK_Q) of lse and delta as (B·H, N).
    """
    tiles, q_ring, go_ring, block_bars, bars, feed = allocate(k_desc.dtype, BLOCK_K, BLOCK_Q, BLOCK_D, STAGES)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], delta_desc.layout)
    rings = (q_ring, go_ring, lse_ring, delta_ring)
    blocks, all_heads = gl.cdiv(num_keys, BLOCK_K), batch * heads
    work = (blocks * all_heads, heads, (blocks, all_heads, section), (p_tiles, tiles_b, tiles_n))
    mask, results = (p_intervals, mask_b, num_keys), (p_dk, p_dv, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n)
    owned, streamed = (k_desc, v_desc), (q_desc, go_desc, lse_desc, delta_desc)
    gl.warp_specialize(
        [
            (_consume, (tiles, rings, block_bars, bars, feed, work, mask, results, group, scale, 0, HEAD_DIM)),
            (_consume, (tiles, rings, block_bars, bars, feed, work, mask, results, group, scale, 1, HEAD_DIM)),
            (produce, (owned, streamed, tiles, rings, block_bars, bars, feed, work, p_next, group, 0, True)),
        ],
        [4, 1],
        [240, 24],
    )


def backward_key(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    intervals: Tensor, tiles: Tensor, scale: float, chosen: tuning.Launch,
) -> None:  # fmt: skip
    """Fills dk, dv. q, k, v, grad_out of 16 bits, D a multiple of 8; lse (in log2) and delta (B, H, N), contiguous."""
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group = heads // kv_heads
    heads_of_a_section = SECTION_BYTES // (4 * num_queries * head_dim * group)
    programs = min(tiles.shape[1] // WIDTH * batch * kv_heads, tuning.processors(q.device))
    launch(
        specialised_key_kernel, programs,
        *(describe(tensor, chosen.block_k) for tensor in (k, v)),
        *(describe(tensor, chosen.block_q) for tensor in (q, grad_out)),
        *(describe_numbers(tensor, chosen.block_q) for tensor in (lse, delta)),
        dk, dv, intervals, tiles, no_items(q.device), *dk.stride()[:3], *dv.stride()[:3],
        *row_strides(intervals, tiles), WIDTH,
        batch, kv_heads, group, num_keys, scale, max(1, heads_of_a_section),
        **constexprs(chosen, head_dim), num_warps=4,
    )  # fmt: skip
