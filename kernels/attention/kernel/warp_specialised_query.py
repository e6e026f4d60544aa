"""dq of `gradients.py` for Hopper, in Gluon: warps that copy beside warps that multiply.

Roles, rings of places, barriers and the order of blocks are those of `warp_specialised.py`. A consumer owns 64 queries;
keys, values and intervals are streamed past them. It keeps the tensor cores at work while it exponentiates:

    scores_{t+1} = q k_{t+1}ᵀ     dp_{t+1} = grad_out v_{t+1}ᵀ              issued, and while they run
    ds_t  =  exp2(scores_t - lse) ∘ (dp_t - δ)
    dq   +=  ds_t k_t                                                     issued behind them, then all are awaited

The product that takes ds is what keeps the compiler from awaiting the others before ds is computed. Numbers are those
of `gradients.py` in 16 bits, operation by operation.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel.blocks import LOG2_E, row_strides
from transfusion.kernels.attention.kernel.specialised_blocks import (
    ROWS,
    SECTION_BYTES,
    allocate,
    column_intervals,
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
def _issue(n, q_rows, go_rows, rings, bars, S: gl.constexpr):
    """Scores and dp of the n-th tile, issued."""
    k_ring, v_ring, _i_ring = rings
    STAGES: gl.constexpr = k_ring.shape[0]
    mbarrier.wait(bars.index(n % STAGES), n // STAGES & 1)
    return products(q_rows, k_ring.index(n % STAGES), S), products(go_rows, v_ring.index(n % STAGES), S)


@gluon.jit
def _weighted(dq, scores, dp, n, rings, rows, exponent, S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr):
    """dq + ds k of the n-th tile, issued."""
    k_ring, _v_ring, i_ring = rings
    queries, lse, delta = rows
    STAGES: gl.constexpr = k_ring.shape[0]
    p = gl.exp2(scores * exponent - lse)
    if MASKED:
        start, end = column_intervals(i_ring.index(n % STAGES), S)
        p = gl.where((start <= queries) ^ (end <= queries), p, 0.0)
    ds = gl.convert_layout((p * (dp - delta)).to(k_ring.dtype), P)
    return warpgroup_mma(ds, k_ring.index(n % STAGES), dq, is_async=True)


@gluon.jit
def _step(
    dq, scores, dp, n, q_rows, go_rows, rings, bars, rows, exponent,
    S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dq with the n-th tile; scores and dp of the next, whose products run beside what is computed here."""
    STAGES: gl.constexpr = rings[0].shape[0]
    next_scores, next_dp = _issue(n + 1, q_rows, go_rows, rings, bars, S)
    dq = _weighted(dq, scores, dp, n, rings, rows, exponent, S, P, MASKED)
    dq, next_scores, next_dp = warpgroup_mma_wait(0, deps=[dq, next_scores, next_dp])
    mbarrier.arrive(bars.index(STAGES + n % STAGES))
    return dq, next_scores, next_dp, n + 1


@gluon.jit
def _two_steps(
    dq, scores, dp, n, q_rows, go_rows, rings, bars, rows, exponent,
    S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What loops are over: registers of next and present scores change places. In a loop over one all are copied."""
    dq, others, other_dp, n = _step(dq, scores, dp, n, q_rows, go_rows, rings, bars, rows, exponent, S, P, MASKED)
    return _step(dq, others, other_dp, n, q_rows, go_rows, rings, bars, rows, exponent, S, P, MASKED)


@gluon.jit
def _dq(
    n, masked_tiles, tile_count, q_rows, go_rows, rings, done, bars, rows, exponent,
    S: gl.constexpr, O: gl.constexpr,
):  # fmt: skip
    """dq/scale of a block that sees tiles from the n-th on, masked ones before full ones.

    Full ones that make a pair with a masked one, or come last, are masked too: right for every tile.
    """
    STAGES: gl.constexpr = rings[0].shape[0]
    BLOCK_D: gl.constexpr = rings[0].shape[2]
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
    scores, dp = _issue(n, q_rows, go_rows, rings, bars, S)
    scores, dp = warpgroup_mma_wait(0, deps=[scores, dp])
    pairs = (tile_count - 1) // 2
    masked_pairs = gl.minimum((masked_tiles + 1) // 2, pairs)
    for _ in range(masked_pairs):
        dq, scores, dp, n = _two_steps(dq, scores, dp, n, q_rows, go_rows, rings, bars, rows, exponent, S, P, True)
    for _ in range(masked_pairs, pairs):
        dq, scores, dp, n = _two_steps(dq, scores, dp, n, q_rows, go_rows, rings, bars, rows, exponent, S, P, False)
    if tile_count % 2 == 0:
        dq, scores, dp, n = _step(dq, scores, dp, n, q_rows, go_rows, rings, bars, rows, exponent, S, P, True)
    mbarrier.arrive(done)
    dq = warpgroup_mma_wait(0, deps=[_weighted(dq, scores, dp, n, rings, rows, exponent, S, P, True)])
    mbarrier.arrive(bars.index(STAGES + n % STAGES))
    return dq


@gluon.jit
def _consume(
    tiles, rings, block_bars, bars, feed, work, numbers, results, num_queries, scale,
    HALF: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """dq of one half of each block's rows."""
    items, heads, _order, _lines = work
    p_lse, p_delta = numbers
    p_dq, dq_b, dq_h, dq_n = results
    PLACES: gl.constexpr = tiles[0].shape[0]
    BLOCK_Q: gl.constexpr = tiles[0].shape[1]
    BLOCK_K: gl.constexpr = rings[0].shape[1]
    BLOCK_D: gl.constexpr = rings[0].shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    n = 0
    count = 0
    item, masked_tiles, tile_count = told(0, feed)
    while item < items:
        head, block, _line = place(item, work, True)
        first_row = block * BLOCK_Q + HALF * ROWS
        queries = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, S))
        numbers_at = gl.cast(head, gl.int64) * num_queries + queries
        # a row past the end has p = 0, as has one that sees nothing: it is in no full tile
        lse = gl.load(p_lse + numbers_at, mask=queries < num_queries, other=float("inf"))
        delta = gl.load(p_delta + numbers_at, mask=queries < num_queries, other=0.0)
        rows = (gl.expand_dims(queries, 1), gl.expand_dims(lse, 1), gl.expand_dims(delta, 1))
        dq = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        held = count % PLACES
        mbarrier.wait(block_bars.index(held), count // PLACES & 1)
        q_rows = tiles[0].index(held).slice(HALF * ROWS, ROWS, 0)
        go_rows = tiles[1].index(held).slice(HALF * ROWS, ROWS, 0)
        done = block_bars.index(PLACES + held)
        if tile_count > 0:
            exponent = scale * LOG2_E
            dq = _dq(n, masked_tiles, tile_count, q_rows, go_rows, rings, done, bars, rows, exponent, S, O)
            n += tile_count
        else:
            mbarrier.arrive(done)
        base = p_dq + gl.cast(head // heads, gl.int64) * dq_b + gl.cast(head % heads, gl.int64) * dq_h
        store_rows(base, dq_n, first_row, num_queries, (dq * scale).to(rings[0].dtype), HEAD_DIM)
        count += 1
        item, masked_tiles, tile_count = told(count, feed)


@gluon.jit
def specialised_query_kernel(
    q_desc, go_desc, k_desc, v_desc, i_desc, p_dq, p_lse, p_delta, p_tiles, p_next, dq_b, dq_h, dq_n, own_mask,
    tiles_b, tiles_n, batch, heads, group, num_queries, scale, section,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of every block of rows, with two places or more. Grid: as many programs as stay on the device, at most.

    Descriptors: blocks (1, 1, BLOCK_Q or BLOCK_K, BLOCK_D) of q, grad_out, k and v, and (1, 2·BLOCK_K) of the
    intervals; own_mask is 1 where each row of the batch has its own, else 0.
    """
    tiles, k_ring, v_ring, block_bars, bars, feed = allocate(q_desc.dtype, BLOCK_Q, BLOCK_K, BLOCK_D, STAGES)
    i_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 2 * BLOCK_K], i_desc.layout)
    rings = (k_ring, v_ring, i_ring)
    blocks, all_heads = gl.cdiv(num_queries, BLOCK_Q), batch * heads
    work = (blocks * all_heads, heads, (blocks, all_heads, section), (p_tiles, tiles_b, tiles_n))
    numbers, results = (p_lse, p_delta), (p_dq, dq_b, dq_h, dq_n)
    owned, streamed = (q_desc, go_desc), (k_desc, v_desc, i_desc)
    gl.warp_specialize(
        [
            (_consume, (tiles, rings, block_bars, bars, feed, work, numbers, results, num_queries, scale, 0, HEAD_DIM)),
            (_consume, (tiles, rings, block_bars, bars, feed, work, numbers, results, num_queries, scale, 1, HEAD_DIM)),
            (produce, (owned, streamed, tiles, rings, block_bars, bars, feed, work, p_next, group, own_mask, False)),
        ],
        [4, 1],
        [240, 24],
    )


def backward_query(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, intervals: Tensor,
    tiles: Tensor, scale: float, chosen: tuning.Launch,
) -> None:  # fmt: skip
    """Fills dq. q, k, v, grad_out of 16 bits, D a multiple of 8; lse (in log2) and delta (B, H, N), contiguous."""
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    heads_of_a_section = SECTION_BYTES * (heads // kv_heads) // (4 * num_keys * head_dim)
    programs = min(tiles.shape[1] // WIDTH * batch * heads, tuning.processors(q.device))
    launch(
        specialised_query_kernel, programs,
        *(describe(tensor, chosen.block_q) for tensor in (q, grad_out)),
        *(describe(tensor, chosen.block_k) for tensor in (k, v)),
        describe_numbers(intervals.flatten(1), 2 * chosen.block_k),
        dq, lse, delta, tiles, no_items(q.device), *dq.stride()[:3], int(intervals.shape[0] > 1),
        row_strides(intervals, tiles)[1], WIDTH,
        batch, heads, heads // kv_heads, num_queries, scale, max(1, heads_of_a_section),
        **constexprs(chosen, head_dim), num_warps=4,
    )  # fmt: skip
