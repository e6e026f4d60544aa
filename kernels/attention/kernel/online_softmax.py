"""out_i = Σ_j exp(S_ij - lse_i) v_j by an online softmax over the key tiles that the mask leaves.

A program takes BLOCK_Q rows of queries and walks their masked runs of key tiles, then their full ones. The loop over a
run is free of branches, so it is software-pipelined. Two things make few queries over many keys fast, both without
another kernel: the query heads that read one key head lie side by side in one program (PACKED), and several programs
share the key tiles of one block of rows (SPLIT), whose results `combine_kernel` then adds in order. Where the table
says so, many queries are `warp_specialised.py`'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel.blocks import (
    FULL_RUNS,
    LN_2,
    LOG2_E,
    MASKED_RUNS,
    exponential,
    is_visible,
    launch_options,
    load_intervals,
    load_rows,
    row_strides,
    store_rows,
)
from transfusion.kernels.attention.plan import plan_forward
from transfusion.kernels.dispatch import new_like
from transfusion.kernels.launching import launch
from transfusion.kernels.mask_tiles.reference import WIDTH

_HELD = 8192  # numbers of the parts that `combine_kernel` holds at once: 64 of a thread


@triton.jit
def _run(
    acc, l, m, q, queries, p_k, p_v, p_intervals, first, last, stride_k, stride_v, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles [first, last): acc = Σ p v, l = Σ p, m = running maximum, in units of `scale`."""
    # Where a row lies in its tile is the same for every tile: computed once, not by a 64-bit product for each.
    rows = tl.arange(0, BLOCK_K)
    k_rows, v_rows = rows.to(tl.int64) * stride_k, rows.to(tl.int64) * stride_v
    for tile in range(first, last):
        first_key = tile * BLOCK_K
        keys = first_key + rows
        inside = keys < num_keys
        k = load_rows(p_k + first_key.to(tl.int64) * stride_k, k_rows, inside, HEAD_DIM, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            start, end = load_intervals(p_intervals, keys, inside)
            visible = is_visible(queries[:, None], start[None, :], end[None, :])
            products = tl.where(visible, products, float("-inf"))
        # scale > 0: the largest score is that of the largest product, and one multiply-add is left for each
        m_new = tl.maximum(m, tl.max(products, 1) * scale)
        base = m_new
        if MASKED:  # -inf - -inf is NaN: a query that has seen no key yet subtracts 0
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exponential(products * scale - base[:, None], PRECISION)
        decay = exponential(m - base, PRECISION)
        l = l * decay + tl.sum(p, 1)
        v = load_rows(p_v + first_key.to(tl.int64) * stride_v, v_rows, inside, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def _runs(
    acc, l, m, runs, p_runs, lower, upper, q, queries, p_k, p_v, p_intervals, stride_k, stride_v,
    num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """All runs of one kind; with SPLIT the tiles lower, ..., upper - 1 of them. -> the same bounds after these runs."""
    for run in range(runs):
        first, last = tl.load(p_runs + 2 * run), tl.load(p_runs + 2 * run + 1)
        if SPLIT:
            length = last - first
            last = tl.minimum(last, first + upper)
            first += tl.maximum(lower, 0)
            lower -= length
            upper -= length
        acc, l, m = _run(
            acc, l, m, q, queries, p_k, p_v, p_intervals, first, last, stride_k, stride_v, num_keys, scale,
            HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, MASKED,
        )  # fmt: skip
    return acc, l, m, lower, upper


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_intervals, p_tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, mask_b, tiles_b, tiles_n,
    batch, heads, group, packed, num_queries, num_keys, scale, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out and lse of a block of rows. Grid: blocks (last, so longest, first) × B·H / packed × splits.

    Rows are the queries of one head, or with PACKED those of `packed` heads, head by head. With SPLIT, p_out and p_lse
    have a leading dimension of splits. scale is `softmax_scale`'s of a positive one.
    """
    blocks = tl.cdiv(packed * num_queries, BLOCK_Q)
    block = blocks - 1 - tl.program_id(0) % blocks
    pack = (tl.program_id(0) // blocks % (batch * heads // packed)).to(tl.int64)
    split = tl.program_id(0) // blocks // (batch * heads // packed)
    b, h = pack // (heads // packed), pack % (heads // packed) * packed
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < packed * num_queries
    queries, head = rows, h + tl.zeros([BLOCK_Q], tl.int64)
    if PACKED:
        queries, head = rows % num_queries, h + rows // num_queries
    q_rows = b * q_b + head * q_h + queries.to(tl.int64) * q_n
    q = load_rows(p_q, q_rows, inside, HEAD_DIM, BLOCK_D, True)
    p_k += b * k_b + h // group * k_h
    p_v += b * v_b + h // group * v_h
    p_intervals += b * mask_b
    p_tiles += b * tiles_b + block * tiles_n
    masked_runs, full_runs = tl.load(p_tiles), tl.load(p_tiles + 1)
    share = tl.cdiv(tl.load(p_tiles + 2), splits)
    lower, upper = split * share, (split + 1) * share

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc, l, m, lower, upper = _runs(
        acc, l, m, masked_runs, p_tiles + MASKED_RUNS, lower, upper, q, queries,
        p_k, p_v, p_intervals, k_n, v_n, num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, True, SPLIT,
    )  # fmt: skip
    acc, l, m, _, _ = _runs(
        acc, l, m, full_runs, p_tiles + FULL_RUNS, lower, upper, q, queries,
        p_k, p_v, p_intervals, k_n, v_n, num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, False, SPLIT,
    )  # fmt: skip

    some = l != 0  # NaN is some
    out = acc / tl.where(some, l, 1.0)[:, None]
    natural = m if PRECISION == "ieee" else m * LN_2
    lse = tl.where(some, natural + tl.log(tl.where(some, l, 1.0)), float("-inf"))
    first_row = split.to(tl.int64) * batch  # of this split, where there are several
    out_rows = (first_row + b) * out_b + head * out_h + queries.to(tl.int64) * out_n
    store_rows(p_out, out_rows, inside, out, HEAD_DIM, BLOCK_D)
    tl.store(p_lse + ((first_row + b) * heads + head) * num_queries + queries, lse, mask=inside)


@triton.jit
def combine_kernel(
    p_out, p_lse, p_parts, p_part_lse, out_b, out_h, out_n, heads, num_queries, rows, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """lse = log Σ_s exp lse_s, out = Σ_s exp(lse_s - lse) out_s for one query of one head. Grid: B·H·N.

    SPLITS: a power of two, all lse at once; BLOCK_S: out_s that are held at once.
    """
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SPLITS)
    all_lse = tl.load(p_part_lse + every.to(tl.int64) * rows + row, mask=every < splits, other=float("-inf"))
    largest = tl.max(all_lse, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2((all_lse - base) * LOG2_E), 0)
    some = total != 0
    out = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        part = split.to(tl.int64) * rows + row
        part_lse = tl.load(p_part_lse + part, mask=split < splits, other=float("-inf"))
        weight = tl.exp2((part_lse - base) * LOG2_E) / tl.where(some, total, 1.0)
        parts = load_rows(p_parts, part * HEAD_DIM, split < splits, HEAD_DIM, BLOCK_D, True)
        out += tl.sum(parts * weight[:, None], 0)
    tl.store(p_lse + row, tl.where(some, base + tl.log(tl.where(some, total, 1.0)), float("-inf")))
    b, h, query = row // num_queries // heads, row // num_queries % heads, row % num_queries
    lanes = tl.arange(0, BLOCK_D)
    pointers = p_out + b * out_b + h * out_h + query * out_n + lanes
    tl.store(pointers, out.to(p_out.dtype.element_ty), mask=lanes < HEAD_DIM)


def forward(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, tiles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> out like q, lse (B, H, N) float32. The last stride of q, k, v is 1."""
    batch, heads, num_queries, head_dim = q.shape
    out = new_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    if scale <= 0:  # the kernel takes the largest product for the largest score
        q, scale = (torch.neg(q, out=new_like(q)), -scale) if scale < 0 else (new_like(q).zero_(), 1.0)
    kv_heads, num_keys = k.shape[1:3]
    chosen, packed, blocks, splits = plan_forward(
        q.device, q.dtype, batch, heads, kv_heads, num_queries, num_keys, head_dim
    )
    lines = tiles.shape[1] // WIDTH
    assert lines == (1 if packed > 1 else blocks), f"{lines} lines of tiles for {blocks} blocks"
    scale = softmax_scale(scale, q.dtype)
    if chosen.specialised:
        from transfusion.kernels.attention.kernel import warp_specialised  # Gluon: loaded where a table asks for it

        warp_specialised.forward(q, k, v, intervals, tiles, scale, chosen, out, lse)
        return out, lse
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(splits * batch, *q.shape[1:], dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits * batch, *lse.shape[1:], dtype=torch.float32, device=q.device)
    launch(
        forward_kernel, blocks * batch * heads // packed * splits,
        q, k, v, parts, part_lse, intervals, tiles,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *parts.stride()[:3],
        *row_strides(intervals, tiles), 0 if packed > 1 else WIDTH,
        batch, heads, heads // kv_heads, packed, num_queries, num_keys, scale, splits,
        PACKED=packed > 1, SPLIT=splits > 1, **launch_options(chosen, head_dim, q.dtype),
    )  # fmt: skip
    if splits > 1:
        launch(
            combine_kernel, batch * heads * num_queries,
            out, lse, parts, part_lse, *out.stride()[:3], heads, num_queries, batch * heads * num_queries, splits,
            **combine_constexprs(head_dim, splits),
        )  # fmt: skip
    return out, lse


def softmax_scale(scale: float, dtype: torch.dtype) -> float:
    """The scale in the units that the kernel's scores have: natural in float32, else of log2."""
    return scale if dtype == torch.float32 else scale * LOG2_E.value


def combine_constexprs(head_dim: int, splits: int) -> dict[str, int]:
    """What the combining kernel is specialised on."""
    every = 1 << (splits - 1).bit_length()
    block_d = tuning.padded_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "SPLITS": every,
        "BLOCK_S": min(every, _HELD // block_d),
    }
