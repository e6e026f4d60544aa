"""Flash attention over an interval mask: three Triton kernels, tiles bounded by the mask, no element mask where full.

Each program walks its tiles in three runs: masked [first, full_first), full [full_first, full_last), masked
[full_last, last). The runs are branch-free, so each is software-pipelined. Names: p_ pointer, BLOCK_Q × BLOCK_K the
tile of scores, BLOCK_D the head dimension padded to a power of two (padded lanes are never read).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels import tuning

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(p_base, rows, stride, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """rows × D of a matrix with unit column stride; rows past num_rows (where CHECK) and padded lanes give 0."""
    lanes = tl.arange(0, BLOCK_D)
    pointers = p_base + rows.to(tl.int64)[:, None] * stride + lanes[None, :]
    if CHECK and BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(rows < num_rows)[:, None] & (lanes < HEAD_DIM)[None, :], other=0.0)
    if CHECK:
        return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(lanes < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store_rows(p_base, rows, stride, num_rows, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    lanes = tl.arange(0, BLOCK_D)
    pointers = p_base + rows.to(tl.int64)[:, None] * stride + lanes[None, :]
    inside = (rows < num_rows)[:, None] & (lanes < HEAD_DIM)[None, :]
    tl.store(pointers, value.to(p_base.dtype.element_ty), mask=inside)


@triton.jit
def _load_interval(p_start, p_end, keys, num_keys):
    """The keys' query intervals; a key past the end is seen by no query."""
    inside = keys < num_keys
    return tl.load(p_start + keys, mask=inside, other=0), tl.load(p_end + keys, mask=inside, other=0)


@triton.jit
def _forward_run(
    acc, l, m, q, rows, p_k, p_v, p_start, p_end, first, last, stride_k, stride_v, num_keys, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles [first, last): acc = Σ p v, l = Σ p, m = running maximum, in units of log2."""
    for tile in range(first, last):
        keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _load_rows(p_k, keys, stride_k, num_keys, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            start, end = _load_interval(p_start, p_end, keys, num_keys)
            visible = (start[None, :] <= rows[:, None]) & (rows[:, None] < end[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        base = m_new
        if MASKED:  # -inf - -inf is NaN: a query that has seen no key yet subtracts 0
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m - base)
        p = tl.exp2(scores - base[:, None])
        l = l * decay + tl.sum(p, 1)
        v = _load_rows(p_v, keys, stride_v, num_keys, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_start, p_end, p_tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, mask_b, tiles_b,
    heads, group, num_queries, num_keys, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries of one head. Grid: query tiles (last, so longest, first) × B·H."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load_rows(p_q + b * q_b + h * q_h, rows, q_n, num_queries, HEAD_DIM, BLOCK_D, True)
    p_k += b * k_b + (h // group) * k_h
    p_v += b * v_b + (h // group) * v_h
    p_start += b * mask_b
    p_end += b * mask_b
    p_tiles += b * tiles_b + tile * 4
    first, full_first = tl.load(p_tiles), tl.load(p_tiles + 1)
    full_last, last = tl.load(p_tiles + 2), tl.load(p_tiles + 3)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc, l, m = _forward_run(
        acc, l, m, q, rows, p_k, p_v, p_start, p_end, first, full_first, k_n, v_n, num_keys, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, True,
    )  # fmt: skip
    acc, l, m = _forward_run(
        acc, l, m, q, rows, p_k, p_v, p_start, p_end, full_first, full_last, k_n, v_n, num_keys, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, False,
    )  # fmt: skip
    acc, l, m = _forward_run(
        acc, l, m, q, rows, p_k, p_v, p_start, p_end, full_last, last, k_n, v_n, num_keys, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, True,
    )  # fmt: skip

    seen = l > 0
    out = acc / tl.where(seen, l, 1.0)[:, None]
    _store_rows(p_out + b * out_b + h * out_h, rows, out_n, num_queries, out, HEAD_DIM, BLOCK_D)
    lse = tl.where(seen, m * LN_2 + tl.log(tl.where(seen, l, 1.0)), float("-inf"))
    tl.store(p_lse + row * num_queries + rows, lse, mask=rows < num_queries)


@triton.jit
def delta_kernel(
    p_out, p_grad_out, p_grad_lse, p_delta,
    out_b, out_h, out_n, go_b, go_h, go_n, gl_b, gl_h, gl_n, heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta_i = grad_out_i·out_i - grad_lse_i, float32."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    out = _load_rows(p_out + b * out_b + h * out_h, rows, out_n, num_queries, HEAD_DIM, BLOCK_D, True)
    grad_out = _load_rows(p_grad_out + b * go_b + h * go_h, rows, go_n, num_queries, HEAD_DIM, BLOCK_D, True)
    inside = rows < num_queries
    grad_lse = tl.load(p_grad_lse + b * gl_b + h * gl_h + rows.to(tl.int64) * gl_n, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1) - grad_lse
    tl.store(p_delta + row * num_queries + rows, delta, mask=inside)


@triton.jit
def _backward_query_run(
    dq, q, grad_out, lse, delta, rows, p_k, p_v, p_start, p_end, first, last, stride_k, stride_v,
    num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += dS k over key tiles [first, last).

    lse is subtracted before the change of base: the difference is small where p is not, and rounds little.
    """
    for tile in range(first, last):
        keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _load_rows(p_k, keys, stride_k, num_keys, HEAD_DIM, BLOCK_D, MASKED)
        v = _load_rows(p_v, keys, stride_v, num_keys, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.exp2((scores - lse[:, None]) * LOG2_E)
        if MASKED:
            start, end = _load_interval(p_start, p_end, keys, num_keys)
            visible = (start[None, :] <= rows[:, None]) & (rows[:, None] < end[None, :])
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_query_kernel(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_dq, p_start, p_end, p_tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n, dq_b, dq_h, dq_n, mask_b, tiles_b,
    heads, group, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head; grid as the forward's."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load_rows(p_q + b * q_b + h * q_h, rows, q_n, num_queries, HEAD_DIM, BLOCK_D, True)
    grad_out = _load_rows(p_grad_out + b * go_b + h * go_h, rows, go_n, num_queries, HEAD_DIM, BLOCK_D, True)
    inside = rows < num_queries
    lse = tl.load(p_lse + row * num_queries + rows, mask=inside, other=float("inf"))
    delta = tl.load(p_delta + row * num_queries + rows, mask=inside, other=0.0)
    p_k += b * k_b + (h // group) * k_h
    p_v += b * v_b + (h // group) * v_h
    p_start += b * mask_b
    p_end += b * mask_b
    p_tiles += b * tiles_b + tile * 4
    first, full_first = tl.load(p_tiles), tl.load(p_tiles + 1)
    full_last, last = tl.load(p_tiles + 2), tl.load(p_tiles + 3)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dq = _backward_query_run(
        dq, q, grad_out, lse, delta, rows, p_k, p_v, p_start, p_end, first, full_first, k_n, v_n,
        num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, True,
    )  # fmt: skip
    dq = _backward_query_run(
        dq, q, grad_out, lse, delta, rows, p_k, p_v, p_start, p_end, full_first, full_last, k_n, v_n,
        num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, False,
    )  # fmt: skip
    dq = _backward_query_run(
        dq, q, grad_out, lse, delta, rows, p_k, p_v, p_start, p_end, full_last, last, k_n, v_n,
        num_keys, scale, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION, True,
    )  # fmt: skip
    _store_rows(p_dq + b * dq_b + h * dq_h, rows, dq_n, num_queries, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_key_run(
    dk, dv, k, v, start, end, p_q, p_grad_out, p_lse, p_delta, first, last, stride_q, stride_go,
    num_queries, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dv += Pᵀ dout, dk += dSᵀ q over query tiles [first, last), on transposed tiles (BLOCK_K, BLOCK_Q)."""
    for tile in range(first, last):
        rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = rows < num_queries
        q = _load_rows(p_q, rows, stride_q, num_queries, HEAD_DIM, BLOCK_D, True)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        # A query past the end has lse = +inf, so p = 0, in full tiles too.
        lse = tl.load(p_lse + rows, mask=inside, other=float("inf"))
        p = tl.exp2((scores - lse[None, :]) * LOG2_E)
        if MASKED:
            visible = (start[:, None] <= rows[None, :]) & (rows[None, :] < end[:, None])
            p = tl.where(visible, p, 0.0)
        grad_out = _load_rows(p_grad_out, rows, stride_go, num_queries, HEAD_DIM, BLOCK_D, True)
        dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        delta = tl.load(p_delta + rows, mask=inside, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_key_kernel(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_dk, p_dv, p_start, p_end, p_tiles,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, tiles_b, kv_heads, group, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of one tile of keys of one key head, its group of query heads summed in order: no atomics."""
    tiles = tl.cdiv(num_keys, BLOCK_K)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv = row // kv_heads, row % kv_heads
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _load_rows(p_k + b * k_b + kv * k_h, keys, k_n, num_keys, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(p_v + b * v_b + kv * v_h, keys, v_n, num_keys, HEAD_DIM, BLOCK_D, True)
    start, end = _load_interval(p_start + b * mask_b, p_end + b * mask_b, keys, num_keys)
    p_tiles += b * tiles_b + tile * 4
    first, full_first = tl.load(p_tiles), tl.load(p_tiles + 1)
    full_last, last = tl.load(p_tiles + 2), tl.load(p_tiles + 3)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for h in range(kv * group, kv * group + group):
        p_qh, p_goh = p_q + b * q_b + h * q_h, p_grad_out + b * go_b + h * go_h
        offset = (b * kv_heads * group + h) * num_queries
        p_l, p_d = p_lse + offset, p_delta + offset
        dk, dv = _backward_key_run(
            dk, dv, k, v, start, end, p_qh, p_goh, p_l, p_d, first, full_first, q_n, go_n,
            num_queries, scale, HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION, True,
        )  # fmt: skip
        dk, dv = _backward_key_run(
            dk, dv, k, v, start, end, p_qh, p_goh, p_l, p_d, full_first, full_last, q_n, go_n,
            num_queries, scale, HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION, False,
        )  # fmt: skip
        dk, dv = _backward_key_run(
            dk, dv, k, v, start, end, p_qh, p_goh, p_l, p_d, full_last, last, q_n, go_n,
            num_queries, scale, HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION, True,
        )  # fmt: skip
    _store_rows(p_dk + b * dk_b + kv * dk_h, keys, dk_n, num_keys, dk * scale, HEAD_DIM, BLOCK_D)
    _store_rows(p_dv + b * dv_b + kv * dv_h, keys, dv_n, num_keys, dv, HEAD_DIM, BLOCK_D)


# -------------------------------------------------------------------- launchers


def forward(
    q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, query_end: Tensor, tiles: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """-> out like q, lse (B, H, N) float32. The last stride of q, k, v is 1."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    batch, heads, num_queries, _ = q.shape
    meta = _meta("forward", q)
    with torch.cuda.device_of(q):
        forward_kernel[(_programs(num_queries, meta["BLOCK_Q"], batch * heads, tiles),)](
            q, k, v, out, lse, query_start, query_end, tiles,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *_row_strides(query_start, tiles),
            heads, heads // k.shape[1], num_queries, k.shape[2], scale * LOG2_E.value, **meta,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients like q, k, v; bitwise the same in every run."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()  # expanded, say
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    group = heads // kv_heads
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    sizes = (group, num_queries, num_keys, scale)
    with torch.cuda.device_of(q):
        meta = delta_constexprs(head_dim)
        delta_kernel[(triton.cdiv(num_queries, meta["BLOCK_Q"]) * batch * heads,)](
            out, grad_out, grad_lse, delta, *out.stride()[:3], *grad_out.stride()[:3], *grad_lse.stride(),
            heads, num_queries, **meta,
        )  # fmt: skip
        meta = _meta("backward_key", q)
        backward_key_kernel[(_programs(num_keys, meta["BLOCK_K"], batch * kv_heads, key_tiles),)](
            q, k, v, grad_out, lse, delta, dk, dv, query_start, query_end, key_tiles,
            *strides, *dk.stride()[:3], *dv.stride()[:3], *_row_strides(query_start, key_tiles),
            kv_heads, *sizes, **meta,
        )  # fmt: skip
        meta = _meta("backward_query", q)
        backward_query_kernel[(_programs(num_queries, meta["BLOCK_Q"], batch * heads, query_tiles),)](
            q, k, v, grad_out, lse, delta, dq, query_start, query_end, query_tiles,
            *strides, *dq.stride()[:3], *_row_strides(query_start, query_tiles), heads, *sizes, **meta,
        )  # fmt: skip
    return dq, dk, dv


def _row_strides(query_start: Tensor, tiles: Tensor) -> tuple[int, int]:
    """Batch strides of the mask vectors and of the tile bounds: 0 where one row serves the whole batch."""
    return tuple(0 if t.shape[0] == 1 else t.stride(0) for t in (query_start, tiles))  # type: ignore[return-value]


def _programs(length: int, block: int, rows: int, tiles: Tensor) -> int:
    """Number of programs: tiles of one row × rows."""
    count = triton.cdiv(length, block)
    assert tiles.shape[1] == count, f"bounds for {tiles.shape[1]} tiles, the launch has {count}"
    return count * rows


def _meta(stage: str, q: Tensor) -> dict[str, Any]:
    launch = tuning.launch("attention", stage, tuning.table_name(q.device), q.dtype, q.shape[3])
    return constexprs(launch, q.shape[3], q.dtype) | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}


def constexprs(launch: tuning.Launch, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are specialised on. Products of float32 are IEEE, not TF32, which would round the inputs."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tuning.padded_head_dim(head_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_K": launch.block_k,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def delta_constexprs(head_dim: int) -> dict[str, int]:
    """What the delta kernel is specialised on: at least 1024 elements of out a program."""
    block_d = tuning.padded_head_dim(head_dim)
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_Q": 1024 // min(block_d, 64)}
