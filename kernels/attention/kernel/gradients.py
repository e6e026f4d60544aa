"""dv = Pᵀ dout, dS = P ∘ (dout vᵀ - δ), dq = scale·dS k, dk = scale·dSᵀ q, P computed again from lse.

Two kernels, each with one owner for every output: no atomics, so the same bits in every run. As in the forward a
program walks the masked runs of its line of tiles, then the full ones; dk and dv in float32 in the other order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel.blocks import (
    FULL_RUNS,
    LOG2_E,
    MASKED_RUNS,
    is_visible,
    launch_options,
    load_intervals,
    load_numbers,
    load_rows,
    probabilities,
    row_strides,
    store_rows,
)
from transfusion.kernels.attention.plan import plan_backward
from transfusion.kernels.dispatch import new_like
from transfusion.kernels.launching import launch
from transfusion.kernels.mask_tiles.reference import WIDTH


@triton.jit
def delta_kernel(
    p_out, p_grad_out, p_grad_lse, p_delta, p_lse, p_lse2,
    out_b, out_h, out_n, go_b, go_h, go_n, gl_b, gl_h, gl_n, heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta_i = grad_out_i·out_i - grad_lse_i, float32; without p_grad_lse where nothing depends on lse.

    Where scores are in units of log2 also lse in those, once and not for each tile that reads it.
    """
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    queries = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    inside = queries < num_queries
    out = load_rows(p_out + b * out_b + h * out_h, queries * out_n, inside, HEAD_DIM, BLOCK_D, True)
    grad_out = load_rows(p_grad_out + b * go_b + h * go_h, queries * go_n, inside, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if p_grad_lse is not None:
        delta -= tl.load(p_grad_lse + b * gl_b + h * gl_h + queries * gl_n, mask=inside, other=0.0)
    tl.store(p_delta + row * num_queries + queries, delta, mask=inside)
    if p_lse2 is not None:
        lse = tl.load(p_lse + row * num_queries + queries, mask=inside, other=0.0)
        tl.store(p_lse2 + row * num_queries + queries, lse * LOG2_E, mask=inside)


@triton.jit
def _query_runs(
    dq, q, grad_out, lse, delta, queries, runs, p_runs, p_k, p_v, p_intervals, stride_k, stride_v, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += dS k over the key tiles of all runs of one kind."""
    # Where a row lies in its tile is the same for every tile: computed once, not by a 64-bit product for each.
    rows = tl.arange(0, BLOCK_K)
    k_rows, v_rows = rows.to(tl.int64) * stride_k, rows.to(tl.int64) * stride_v
    for run in range(runs):
        for tile in range(tl.load(p_runs + 2 * run), tl.load(p_runs + 2 * run + 1)):
            first_key = tile * BLOCK_K
            keys = first_key + rows
            inside = keys < num_keys
            k = load_rows(p_k + first_key.to(tl.int64) * stride_k, k_rows, inside, HEAD_DIM, BLOCK_D, MASKED)
            v = load_rows(p_v + first_key.to(tl.int64) * stride_v, v_rows, inside, HEAD_DIM, BLOCK_D, MASKED)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = probabilities(products, lse[:, None], scale, PRECISION)
            if MASKED:
                start, end = load_intervals(p_intervals, keys, inside)
                visible = is_visible(queries[:, None], start[None, :], end[None, :])
                p = tl.where(visible, p, 0.0)
            dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_query_kernel(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_dq, p_intervals, p_tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n, dq_b, dq_h, dq_n, mask_b, tiles_b, tiles_n,
    heads, group, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head. Grid: query tiles (last, so longest, first) × B·H."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside, rows = queries < num_queries, queries.to(tl.int64)
    q = load_rows(p_q + b * q_b + h * q_h, rows * q_n, inside, HEAD_DIM, BLOCK_D, True)
    grad_out = load_rows(p_grad_out + b * go_b + h * go_h, rows * go_n, inside, HEAD_DIM, BLOCK_D, True)
    lse = tl.load(p_lse + row * num_queries + rows, mask=inside, other=float("inf"))
    delta = tl.load(p_delta + row * num_queries + rows, mask=inside, other=0.0)
    p_k += b * k_b + h // group * k_h
    p_v += b * v_b + h // group * v_h
    p_intervals += b * mask_b
    p_tiles += b * tiles_b + tile * tiles_n

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dq = _query_runs(
        dq, q, grad_out, lse, delta, queries, tl.load(p_tiles), p_tiles + MASKED_RUNS, p_k, p_v, p_intervals,
        k_n, v_n, num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, True,
    )  # fmt: skip
    dq = _query_runs(
        dq, q, grad_out, lse, delta, queries, tl.load(p_tiles + 1), p_tiles + FULL_RUNS, p_k, p_v, p_intervals,
        k_n, v_n, num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, False,
    )  # fmt: skip
    store_rows(p_dq + b * dq_b + h * dq_h, rows * dq_n, inside, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_runs(
    dk, dv, k, v, start, end, runs, p_runs, p_q, p_grad_out, p_lse, p_delta, stride_q, stride_go, num_queries, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dv += Pᵀ dout, dk += dSᵀ q over the query tiles of all runs of one kind; scores are (BLOCK_K, BLOCK_Q).

    In float32 the last queries come first, and full tiles before masked ones: the first queries see few keys and weigh
    each the most, and a large sum rounds what is added to it. In 16 bits the result is rounded far more than that.
    A tile with queries past the end is a masked one. Offsets of rows are computed anew for each tile, unlike elsewhere:
    the two accumulators leave no registers to keep them in.
    """
    for run in range(runs):
        first, last = tl.load(p_runs + 2 * run), tl.load(p_runs + 2 * run + 1)
        for number in range(first, last):
            tile = first + last - 1 - number if PRECISION == "ieee" else number
            queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            inside, rows = queries < num_queries, queries.to(tl.int64)
            q = load_rows(p_q, rows * stride_q, inside, HEAD_DIM, BLOCK_D, MASKED)
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            lse = load_numbers(p_lse, queries, inside, MASKED)
            p = probabilities(products, lse[None, :], scale, PRECISION)
            if MASKED:
                visible = is_visible(queries[None, :], start[:, None], end[:, None])
                p = tl.where(visible, p, 0.0)
            grad_out = load_rows(p_grad_out, rows * stride_go, inside, HEAD_DIM, BLOCK_D, MASKED)
            dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
            delta = load_numbers(p_delta, queries, inside, MASKED)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_key_kernel(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_dk, p_dv, p_intervals, p_tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, tiles_b, tiles_n, kv_heads, group, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of one tile of keys of one key head, summed over its query heads in order. Grid: key tiles × B·H_kv."""
    tiles = tl.cdiv(num_keys, BLOCK_K)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv = row // kv_heads, row % kv_heads
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, rows = keys < num_keys, keys.to(tl.int64)
    k = load_rows(p_k + b * k_b + kv * k_h, rows * k_n, inside, HEAD_DIM, BLOCK_D, True)
    v = load_rows(p_v + b * v_b + kv * v_h, rows * v_n, inside, HEAD_DIM, BLOCK_D, True)
    start, end = load_intervals(p_intervals + b * mask_b, keys, inside)
    p_tiles += b * tiles_b + tile * tiles_n
    masked_runs, full_runs = tl.load(p_tiles), tl.load(p_tiles + 1)

    TURN_OF_MASKED: tl.constexpr = 1 if PRECISION == "ieee" else 0
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    p_q += b * q_b + kv * group * q_h
    p_grad_out += b * go_b + kv * group * go_h
    p_lse += row * group * num_queries
    p_delta += row * group * num_queries
    for _ in range(group):
        for kind in tl.static_range(2):
            runs = masked_runs if kind == TURN_OF_MASKED else full_runs
            p_runs = p_tiles + (MASKED_RUNS if kind == TURN_OF_MASKED else FULL_RUNS)
            dk, dv = _key_runs(
                dk, dv, k, v, start, end, runs, p_runs, p_q, p_grad_out, p_lse, p_delta, q_n, go_n, num_queries, scale,
                HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION, kind == TURN_OF_MASKED,
            )  # fmt: skip
        p_q += q_h
        p_grad_out += go_h
        p_lse += num_queries
        p_delta += num_queries
    store_rows(p_dk + b * dk_b + kv * dk_h, rows * dk_n, inside, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(p_dv + b * dv_b + kv * dv_h, rows * dv_n, inside, dv, HEAD_DIM, BLOCK_D)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients like q, k, v; bitwise the same in every run."""
    dq, dk, dv = (new_like(t) for t in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    batch, heads, num_queries, head_dim = q.shape
    delta, lse2 = torch.empty_like(lse), None if q.dtype == torch.float32 else torch.empty_like(lse)
    inputs = (q, k, v, grad_out, lse if lse2 is None else lse2, delta)
    meta = delta_constexprs(head_dim)
    launch(
        delta_kernel, -(-num_queries // meta["BLOCK_Q"]) * batch * heads,
        out, grad_out, grad_lse, delta, lse, lse2, *out.stride()[:3], *grad_out.stride()[:3],
        *((None,) * 3 if grad_lse is None else grad_lse.stride()), heads, num_queries, **meta,
    )  # fmt: skip
    _backward_key(*inputs, dk, dv, intervals, key_tiles, scale)
    _backward_query(*inputs, dq, intervals, query_tiles, scale)
    return dq, dk, dv


def _backward_key(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    intervals: Tensor, tiles: Tensor, scale: float,
) -> None:  # fmt: skip
    (batch, heads, num_queries, head_dim), (kv_heads, num_keys) = q.shape, k.shape[1:3]
    chosen = plan_backward(q.device, q.dtype, "key", num_queries, num_keys, head_dim)
    lines = _lines(num_keys, chosen.block_k, tiles)
    if chosen.specialised:
        from transfusion.kernels.attention.kernel import warp_specialised_key  # Gluon: loaded where a table asks for it

        warp_specialised_key.backward_key(q, k, v, grad_out, lse, delta, dk, dv, intervals, tiles, scale, chosen)
        return
    launch(
        backward_key_kernel, lines * batch * kv_heads,
        q, k, v, grad_out, lse, delta, dk, dv, intervals, tiles,
        *(stride for tensor in (q, k, v, grad_out, dk, dv) for stride in tensor.stride()[:3]),
        *row_strides(intervals, tiles), WIDTH, kv_heads, heads // kv_heads, num_queries, num_keys, scale,
        **launch_options(chosen, head_dim, q.dtype),
    )  # fmt: skip


def _backward_query(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    intervals: Tensor, tiles: Tensor, scale: float,
) -> None:  # fmt: skip
    (batch, heads, num_queries, head_dim), (kv_heads, num_keys) = q.shape, k.shape[1:3]
    chosen = plan_backward(q.device, q.dtype, "query", num_queries, num_keys, head_dim)
    lines = _lines(num_queries, chosen.block_q, tiles)
    if chosen.specialised:
        from transfusion.kernels.attention.kernel import warp_specialised_query

        warp_specialised_query.backward_query(q, k, v, grad_out, lse, delta, dq, intervals, tiles, scale, chosen)
        return
    launch(
        backward_query_kernel, lines * batch * heads,
        q, k, v, grad_out, lse, delta, dq, intervals, tiles,
        *(stride for tensor in (q, k, v, grad_out, dq) for stride in tensor.stride()[:3]),
        *row_strides(intervals, tiles), WIDTH, heads, heads // kv_heads, num_queries, num_keys, scale,
        **launch_options(chosen, head_dim, q.dtype),
    )  # fmt: skip


def _lines(length: int, block: int, tiles: Tensor) -> int:
    count = -(-length // block)
    assert tiles.shape[1] == count * WIDTH, f"{tiles.shape[1] // WIDTH} lines of tiles, the launch has {count}"
    return count


def delta_constexprs(head_dim: int) -> dict[str, int]:
    """What the delta kernel is specialised on: at least 1024 elements of out a program."""
    block_d = tuning.padded_head_dim(head_dim)
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_Q": 1024 // min(block_d, 64)}
