"""The forward of `online_softmax.py` for Hopper, in Gluon: warps that copy beside warps that multiply.

One warp, the producer, has the tensor memory accelerator bring tiles of keys with their intervals, and of values, into
rings of STAGES places in shared memory. Two groups of four warps, the consumers, take 64 rows each of a block of
queries, and keep the tensor cores at work while they exponentiate:

    scores_{t+1}  =  q k_{t+1}ᵀ                 issued: this runs while
    p_t           =  exp2(scale·scores_t - m)   is computed, and acc decays by what m has grown
    acc          +=  p_t v_t                    issued and awaited, with the scores

What the other consumer has issued runs meanwhile. A consumer keeps its rows of q in registers: with 128 lanes, products
of two operands in shared memory would take all that it can read, 128 bytes a cycle, and q's place is free at once for
the next block's. A program stays on its multiprocessor and takes block after block: the producer fetches the next one
while the consumers compute the last. A place of a ring has two barriers: `full`, its bytes have arrived, and `free`,
both consumers are done with them. The n-th use of a place is awaited by n's parity.

Numbers are those of `online_softmax.py` in 16 bits, operation by operation; that file has the derivation.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel.blocks import FULL_RUNS, LN_2, MASKED_RUNS, row_strides
from transfusion.kernels.attention.kernel.specialised_blocks import (
    ROWS,
    SECTION_BYTES,
    allocate_feed,
    column_intervals,
    constexprs,
    describe,
    describe_numbers,
    following,
    no_items,
    place,
    products,
    store_rows,
    tell,
    told,
)
from transfusion.kernels.launching import launch
from transfusion.kernels.mask_tiles.reference import WIDTH


@gluon.jit
def _produce(descriptors, rings, q_bars, k_bars, v_bars, feed, work, p_next, group, own_mask):
    """Copies q of each block, then k, intervals and v of each of its tiles: of masked runs, then of full ones."""
    q_desc, k_desc, v_desc, i_desc = descriptors
    q_tile, k_ring, v_ring, i_ring = rings
    items, heads, _order, _lines = work
    BLOCK_Q: gl.constexpr = q_tile.shape[0]
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_K: gl.constexpr = k_ring.shape[1]
    BLOCK_D: gl.constexpr = k_ring.shape[2]
    Q_BYTES: gl.constexpr = 2 * BLOCK_Q * BLOCK_D
    V_BYTES: gl.constexpr = 2 * BLOCK_K * BLOCK_D
    K_BYTES: gl.constexpr = V_BYTES + 8 * BLOCK_K
    n = 0  # tiles so far
    count = 0  # and blocks
    item = gl.program_id(0)
    while item < items:
        head, block, line = tell(item, count, feed, work, True)
        b, h = head // heads, head % heads
        mbarrier.wait(q_bars.index(1), count & 1 ^ 1)
        mbarrier.expect(q_bars.index(0), Q_BYTES)
        q_to = q_tile.reshape([1, 1, BLOCK_Q, BLOCK_D])
        tma.async_copy_global_to_shared(q_desc, [b, h, block * BLOCK_Q, 0], q_bars.index(0), q_to)
        after = -1
        for kind in gl.static_range(2):
            p_runs = line + (FULL_RUNS if kind else MASKED_RUNS)
            for run in range(gl.load(line + kind)):
                for tile in range(gl.load(p_runs + 2 * run), gl.load(p_runs + 2 * run + 1)):
                    at, free = n % STAGES, n // STAGES & 1 ^ 1
                    key = tile * BLOCK_K
                    mbarrier.wait(k_bars.index(STAGES + at), free)
                    full = k_bars.index(at)
                    mbarrier.expect(full, K_BYTES)
                    k_to = k_ring.index(at).reshape([1, 1, BLOCK_K, BLOCK_D])
                    tma.async_copy_global_to_shared(k_desc, [b, h // group, key, 0], full, k_to)
                    tma.async_copy_global_to_shared(i_desc, [b * own_mask, 2 * key], full, i_ring.index(at))
                    mbarrier.wait(v_bars.index(STAGES + at), free)
                    full = v_bars.index(at)
                    mbarrier.expect(full, V_BYTES)
                    v_to = v_ring.index(at).reshape([1, 1, BLOCK_K, BLOCK_D])
                    tma.async_copy_global_to_shared(v_desc, [b, h // group, key, 0], full, v_to)
                    if after < 0:  # here: a counter in memory answers late, what follows it waits
                        after = following(p_next)
                    n += 1
        if after < 0:
            after = following(p_next)
        item = after
        count += 1
    tell(item, count, feed, work, True)


@gluon.jit
def _scores(n, q, k_ring, k_bars, S: gl.constexpr):
    """q kᵀ of the n-th tile, issued."""
    STAGES: gl.constexpr = k_ring.shape[0]
    mbarrier.wait(k_bars.index(n % STAGES), n // STAGES & 1)
    return products(q, k_ring.index(n % STAGES), S)


@gluon.jit
def _weighted(acc, p, n, v_ring, v_bars):
    """acc + p v of the n-th tile, issued."""
    STAGES: gl.constexpr = v_ring.shape[0]
    mbarrier.wait(v_bars.index(n % STAGES), n // STAGES & 1)
    return warpgroup_mma(p, v_ring.index(n % STAGES), acc, is_async=True)


@gluon.jit
def _visible(scores, start, end, queries):
    """scores where start <= query < end, else -inf. Of the expression Triton 3.7's LLVM packs 64 conditions into words
    of bits and unpacks them: 1079 instructions of two masked tiles with 128 lanes, not 814."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred from_start, from_end, seen;
        setp.le.s32 from_start, $2, $4;
        setp.le.s32 from_end, $3, $4;
        xor.pred seen, from_start, from_end;
        selp.f32 $0, $1, 0fFF800000, seen;
        }""",
        "=r,r,r,r,r", [scores, start, end, queries], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _exponentiated(scores, l, m, n, i_ring, k_bars, queries, scale, S: gl.constexpr, MASKED: gl.constexpr):
    """p of the n-th tile, l, m with it, and what p and l of earlier tiles decay by. Frees the tile's keys."""
    STAGES: gl.constexpr = i_ring.shape[0]
    if MASKED:
        start, end = column_intervals(i_ring.index(n % STAGES), S)
        rows = gl.expand_dims(queries, 1)
        scores = _visible(scores, start, end, rows)
    mbarrier.arrive(k_bars.index(STAGES + n % STAGES))
    m_new = gl.maximum(m, gl.max(scores, 1) * scale)
    base = m_new
    if MASKED:  # -inf - -inf is NaN: a query that has seen no key yet subtracts 0
        base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(scores * scale - gl.expand_dims(base, 1))
    decay = gl.exp2(m - base)
    return p, l * decay + gl.sum(p, 1), m_new, decay


@gluon.jit
def _absorbed(
    acc, l, m, scores, n, rings, k_bars, v_bars, queries, scale, S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr
):
    """acc, l, m with the n-th tile, of which the scores are here; the product with its values is issued."""
    _, _, v_ring, i_ring = rings
    O: gl.constexpr = P.parent
    p, l, m, decay = _exponentiated(scores, l, m, n, i_ring, k_bars, queries, scale, S, MASKED)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, O)), 1)
    return _weighted(acc, gl.convert_layout(p.to(v_ring.dtype), P), n, v_ring, v_bars), l, m


@gluon.jit
def _step(
    acc, l, m, scores, n, q, rings, k_bars, v_bars, queries, scale,
    S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The n-th tile, beside the next one's scores.

    The product that takes p is issued before the only wait: a wait alone ptxas moves up, above all exponentials.
    """
    _, k_ring, v_ring, _ = rings
    STAGES: gl.constexpr = v_ring.shape[0]
    next_scores = _scores(n + 1, q, k_ring, k_bars, S)
    acc, l, m = _absorbed(acc, l, m, scores, n, rings, k_bars, v_bars, queries, scale, S, P, MASKED)
    next_scores, acc = warpgroup_mma_wait(0, deps=[next_scores, acc])
    mbarrier.arrive(v_bars.index(STAGES + n % STAGES))
    return acc, l, m, next_scores, n + 1


@gluon.jit
def _two_steps(
    acc, l, m, scores, n, q, rings, k_bars, v_bars, queries, scale,
    S: gl.constexpr, P: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What loops are over: registers of next and present scores change places. In a loop over one all are copied."""
    acc, l, m, others, n = _step(acc, l, m, scores, n, q, rings, k_bars, v_bars, queries, scale, S, P, MASKED)
    return _step(acc, l, m, others, n, q, rings, k_bars, v_bars, queries, scale, S, P, MASKED)


@gluon.jit
def _attended(n, masked_tiles, tiles, q, rings, k_bars, v_bars, queries, scale, S: gl.constexpr, O: gl.constexpr):
    """acc, l, m of a block that sees tiles from the n-th on, masked ones before full ones.

    Full ones that make a pair with a masked one, or come last, are masked too: right for every tile.
    """
    _, k_ring, v_ring, _ = rings
    STAGES: gl.constexpr = v_ring.shape[0]
    BLOCK_D: gl.constexpr = k_ring.shape[2]
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    scores = warpgroup_mma_wait(0, deps=[_scores(n, q, k_ring, k_bars, S)])
    pairs = (tiles - 1) // 2
    masked_pairs = gl.minimum((masked_tiles + 1) // 2, pairs)
    for _ in range(masked_pairs):
        acc, l, m, scores, n = _two_steps(acc, l, m, scores, n, q, rings, k_bars, v_bars, queries, scale, S, P, True)
    for _ in range(masked_pairs, pairs):
        acc, l, m, scores, n = _two_steps(acc, l, m, scores, n, q, rings, k_bars, v_bars, queries, scale, S, P, False)
    if tiles % 2 == 0:
        acc, l, m, scores, n = _step(acc, l, m, scores, n, q, rings, k_bars, v_bars, queries, scale, S, P, True)
    acc, l, m = _absorbed(acc, l, m, scores, n, rings, k_bars, v_bars, queries, scale, S, P, True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_bars.index(STAGES + n % STAGES))
    return acc, l, m


@gluon.jit
def _consume(
    rings, q_bars, k_bars, v_bars, feed, work, results, num_queries, scale, HALF: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """out and lse of one half of each block's rows."""
    q_tile, k_ring, _, _ = rings
    items, heads, _order, _lines = work
    p_out, p_lse, out_b, out_h, out_n = results
    BLOCK_K: gl.constexpr = k_ring.shape[1]
    BLOCK_D: gl.constexpr = k_ring.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dtype: gl.constexpr = k_ring.dtype
    n = 0
    count = 0
    item, masked_tiles, tiles = told(0, feed)
    while item < items:
        head, block, _line = place(item, work, True)
        first_row = block * q_tile.shape[0] + HALF * ROWS
        queries = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, S))
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        mbarrier.wait(q_bars.index(0), count & 1)
        q = q_tile.slice(HALF * ROWS, ROWS, 0).load(gl.DotOperandLayout(0, S, 2))
        mbarrier.arrive(q_bars.index(1))
        if tiles > 0:
            acc, l, m = _attended(n, masked_tiles, tiles, q, rings, k_bars, v_bars, queries, scale, S, O)
            n += tiles
        some = l != 0  # NaN is some
        total = gl.where(some, l, 1.0)
        lse = gl.where(some, m * LN_2 + gl.log(total), float("-inf"))
        gl.store(p_lse + gl.cast(head, gl.int64) * num_queries + queries, lse, mask=queries < num_queries)
        out = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, O)), 1)
        base = p_out + gl.cast(head // heads, gl.int64) * out_b + gl.cast(head % heads, gl.int64) * out_h
        store_rows(base, out_n, first_row, num_queries, out.to(dtype), HEAD_DIM)
        count += 1
        item, masked_tiles, tiles = told(count, feed)


@gluon.jit
def specialised_forward_kernel(
    q_desc, k_desc, v_desc, i_desc, p_out, p_lse, p_tiles, p_next, out_b, out_h, out_n, own_mask, tiles_b, tiles_n,
    batch, heads, group, num_queries, scale, section,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out and lse of every block of rows, with two places or more. Grid: as many programs as stay on the device.

    The descriptors are `describe`'s: blocks (1, 1, BLOCK_Q or BLOCK_K, BLOCK_D) of q, k and v, and (1, 2·BLOCK_K) of
    the intervals; own_mask is 1 where each row of the batch has its own, else 0.
    """
    dtype: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tile = gl.allocate_shared_memory(dtype, [BLOCK_Q, BLOCK_D], SWIZZLED)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_D], SWIZZLED)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_D], SWIZZLED)
    i_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 2 * BLOCK_K], i_desc.layout)
    # Of each tile or place: first the barriers that say full, then those that say free.
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=2)
    for at in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(at), count=1)
        mbarrier.init(v_bars.index(at), count=1)
        mbarrier.init(k_bars.index(STAGES + at), count=2)
        mbarrier.init(v_bars.index(STAGES + at), count=2)
    feed = allocate_feed()
    fence_async_shared()  # the copies signal what these instructions wrote
    rings = (q_tile, k_ring, v_ring, i_ring)
    blocks, all_heads = gl.cdiv(num_queries, BLOCK_Q), batch * heads
    work = (blocks * all_heads, heads, (blocks, all_heads, section), (p_tiles, tiles_b, tiles_n))
    results = (p_out, p_lse, out_b, out_h, out_n)
    descriptors = (q_desc, k_desc, v_desc, i_desc)
    gl.warp_specialize(
        [
            (_consume, (rings, q_bars, k_bars, v_bars, feed, work, results, num_queries, scale, 0, HEAD_DIM)),
            (_consume, (rings, q_bars, k_bars, v_bars, feed, work, results, num_queries, scale, 1, HEAD_DIM)),
            (_produce, (descriptors, rings, q_bars, k_bars, v_bars, feed, work, p_next, group, own_mask)),
        ],
        [4, 1],
        [240, 24],
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, tiles: Tensor, scale: float, chosen: tuning.Launch,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fills out and lse (B, H, N), contiguous. q, k, v of 16 bits, D a multiple of 8; scale > 0, for exponents of 2."""
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    heads_of_a_section = SECTION_BYTES * (heads // kv_heads) // (4 * num_keys * head_dim)
    programs = min(tiles.shape[1] // WIDTH * batch * heads, tuning.processors(q.device))
    launch(
        specialised_forward_kernel, programs,
        describe(q, chosen.block_q), *(describe(tensor, chosen.block_k) for tensor in (k, v)),
        describe_numbers(intervals.flatten(1), 2 * chosen.block_k),
        out, lse, tiles, no_items(q.device), *out.stride()[:3], int(intervals.shape[0] > 1),
        row_strides(intervals, tiles)[1], WIDTH,
        batch, heads, heads // kv_heads, num_queries, scale, max(1, heads_of_a_section),
        **constexprs(chosen, head_dim), num_warps=4,
    )  # fmt: skip
