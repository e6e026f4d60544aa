"""`transfusion_attention`: exact softmax attention under an `IntervalMask`, its contract, dispatch and autograd.

`op -> {reference | kernel | torch_paths}`, which never import each other; triton loads at the first call that runs it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor

from transfusion.kernels.attention import torch_paths
from transfusion.kernels.attention.plan import launch_backward, launch_forward
from transfusion.kernels.dispatch import autocast_dtype, define, new_like
from transfusion.kernels.interval_mask import IntervalMask, check_mask
from transfusion.kernels.registry import (
    Implementation,
    Op,
    backend,
    check_tensor,
    choose,
    refuse_forward_mode,
    register,
    triton_reasons,
)


def _triton_reasons(*, head_dim: int, **call: Any) -> list[str]:
    reasons = triton_reasons(**call)
    if not 16 <= head_dim <= 256:
        reasons.append(f"head dimension {head_dim} is outside 16..256")
    return reasons


def _no_lse(*, return_lse: bool, **call: Any) -> list[str]:
    return ["it returns no log-sum-exp (return_lse=True)"] if return_lse else []


def _flex_reasons(*, device: torch.device, dtype: torch.dtype, needs_grad: bool, **call: Any) -> list[str]:
    reasons = _no_lse(**call)
    if dtype == torch.float64:
        reasons.append("FlexAttention takes no float64")
    if needs_grad and device.type == "cpu":
        reasons.append("FlexAttention has no backward on a CPU")
    return reasons


OP = register(
    Op(
        "transfusion_attention",
        {
            "triton": Implementation("transfusion.kernels.attention.kernel", _triton_reasons),
            "reference": Implementation("transfusion.kernels.attention.reference"),
            "sdpa": Implementation("transfusion.kernels.attention.torch_paths", _no_lse),
            "flex": Implementation("transfusion.kernels.attention.torch_paths", _flex_reasons),
        },
        cuda_order=("triton", "sdpa", "reference"),
        other_order=("sdpa", "reference"),
    )
)


@overload
def transfusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def transfusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def transfusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = Σ_j softmax_j(scale·q_i·k_j) v_j over the keys j with query_start[j] <= i < query_end[j].

    Args:
        q: (B, H, N, D) float16, bfloat16 or float32 (the reference takes float64 too).
        k: (B, H_kv, M, D), H a multiple of H_kv: query head h reads key head h // (H / H_kv).
        v: like k. Any strides; a last stride other than 1 costs a copy.
        mask: N queries by M keys, of B rows or of one row for the whole batch. Keys that no query sees (the free
            room of a cache) must be finite.
        scale: a number, by default 1/√D. Multiply q by a learned scale instead: it would get no gradient here.
        return_lse: also return lse (B, H, N) float32 (of float64, float64), the natural log of each query's sum of
            exponentials.
        impl: "auto", "triton", "reference", "sdpa" or "flex"; an explicit request is honoured or raises.

    Returns:
        out like q, or (out, lse). A query that sees no key gives 0 and lse -inf. Differentiable in q, k, v, through
        lse too; the backward is bitwise deterministic for "triton". Under autocast q, k, v are cast to its dtype,
        unless they are float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, with the offending value.
        RuntimeError: an explicit `impl` that cannot run here, with every reason.
        NotImplementedError: forward-mode differentiation; torch.func.grad, vjp and vmap over "triton" and "reference".

    Source: arXiv 2408.11039 section 3.1 (the mask); FlashAttention-2, arXiv 2307.08691 (the tiling).
    """
    for letter, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(letter, tensor, " (B, H, N, D)")
    if dtype := autocast_dtype(q.device):
        q, k, v = (tensor.to(dtype) if _is_cast(tensor) else tensor for tensor in (q, k, v))
    _check(q, k, v, mask)
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number; a Tensor would get no gradient: multiply q by it and pass scale=1.0")
    if not (scale is None or hasattr(scale, "__float__")):
        raise TypeError(f"scale={scale!r} must be a number, got {type(scale).__name__}")
    refuse_forward_mode("transfusion_attention", q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    call = {"head_dim": q.shape[3], "return_lse": return_lse, "needs_grad": needs_grad}
    name = choose(OP, impl, device=q.device, dtype=q.dtype, **call)
    if name in ("sdpa", "flex"):
        return (torch_paths.sdpa if name == "sdpa" else torch_paths.flex)(q, k, v, mask, scale)
    tiles: tuple[Tensor | None, ...] = (None, None, None)
    if name == "triton":
        q, k, v = (_readable(t) for t in (q, k, v))
        tiles = _make_tiles(mask, q.dtype, max(q.shape[1] // k.shape[1], 1), q.shape[3], needs_grad)
    out, lse = _attention(q, k, v, mask.intervals, *tiles, scale, name)
    return (out, lse) if return_lse else out


def _readable(tensor: Tensor) -> Tensor:
    """As the kernels read it, with a unit last stride: a copy where it has another."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def prepare_attention(
    mask: IntervalMask,
    *,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    needs_grad: bool | None = None,
    impl: str = "auto",
) -> None:
    """Makes what attention of q (batch, heads, N, head_dim) over k (batch, kv_heads, M, head_dim) keeps with `mask`.

    The first call would make it, but a layer that is both compiled and checkpointed may only read it, because
    torch.compile allows no mutation inside `torch.utils.checkpoint`; and a compiled function that meets one mask twice
    is compiled twice, once to make it and once to read it. needs_grad: also make the tiles of the backward; by default
    where gradients are enabled. dtype is that of q; under autocast, autocast's. Raises what `transfusion_attention`
    would for such a call.
    """
    _check_heads(dtype, heads, kv_heads, head_dim)
    _check_mask(mask, batch)
    if dtype != torch.float64:
        dtype = autocast_dtype(mask.device) or dtype
    needs_grad = torch.is_grad_enabled() if needs_grad is None else needs_grad
    call = {"head_dim": head_dim, "return_lse": False, "needs_grad": needs_grad}
    name = choose(OP, impl, device=mask.device, dtype=dtype, **call)
    if name == "triton":
        _make_tiles(mask, dtype, max(heads // kv_heads, 1), head_dim, needs_grad)
    elif name == "sdpa":
        torch_paths.prepare(mask)
    elif name == "flex":
        torch_paths.prepare_flex(mask)


def _make_tiles(
    mask: IntervalMask, dtype: torch.dtype, group: int, dim: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tiles of the three kernels, made at the first layer and kept with the mask; the backward's if there is one."""
    forward, _ = launch_forward(mask.device, dtype, group, mask.num_queries, dim)
    tiles = mask.query_tiles(forward.block_q, forward.block_k)
    if not needs_grad:
        return tiles, None, None
    query, key = (launch_backward(mask.device, dtype, stage, dim) for stage in ("query", "key"))
    return tiles, mask.query_tiles(query.block_q, query.block_k), mask.key_tiles(key.block_k, key.block_q)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (B, H, N, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one dtype, got q {q.dtype} and {name} {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} on {tensor.device}")
    batch, heads, num_queries, head_dim = q.shape
    _check_heads(q.dtype, heads, k.shape[1], head_dim)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dimension")
    _check_mask(mask, batch)
    num_keys, device = k.shape[2], q.device
    if (mask.num_queries, mask.num_keys) != (num_queries, num_keys):
        raise ValueError(
            f"the mask is {mask.num_queries} queries by {mask.num_keys} keys, q and k are {num_queries} by {num_keys}; "
            "they are (B, H, N, D) and (B, H_kv, M, D): tokens come third"
        )
    if mask.device != device:
        raise ValueError(f"q is on {device}, the mask on {mask.device}; move it with mask.to(device)")


def _check_heads(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"q must be floating point of 16, 32 or 64 bits, got {dtype}")
    if head_dim < 1:
        raise ValueError(f"q has no head dimension: head_dim={head_dim}; give at least one lane")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")


def _check_mask(mask: IntervalMask, batch: int) -> None:
    check_mask("mask", mask)
    if mask.batch_size != 1 and mask.batch_size != batch:  # `in` is wrong for symbolic sizes
        raise ValueError(
            f"the mask has {mask.batch_size} rows for a batch of {batch}; give one for each, or one for all"
        )


# -------------------------------------------------------------------- registration

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor intervals, Tensor? forward_tiles, Tensor? query_tiles, "
    " Tensor? key_tiles, float scale, str impl) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor intervals, "
    "Tensor? query_tiles, Tensor? key_tiles, float scale, str impl) -> (Tensor, Tensor, Tensor)"
)


def _run(*call: Any) -> tuple[Tensor, Tensor]:
    *tensors, forward_tiles, _, _, scale, impl = call
    tiles = () if forward_tiles is None else (forward_tiles,)
    with _without_autocast(tensors[0]):
        result: tuple[Tensor, Tensor] = backend(OP, impl).forward(*tensors, *tiles, scale)
    return result


def _run_backward(grad_out: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, query_tiles, key_tiles, scale, impl = call
    assert impl == "reference" or query_tiles is not None, "the forward ran without a gradient in sight"
    tiles = () if query_tiles is None else (query_tiles, key_tiles)
    grad_out = _readable(grad_out)  # expanded, say
    with _without_autocast(grad_out):
        grads: tuple[Tensor, Tensor, Tensor] = backend(OP, impl).backward(grad_out, *tensors, *tiles, scale)
    return grads


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast would cast it as an input of torch's own operations."""
    return tensor.dtype.is_floating_point and tensor.dtype != torch.float64


def _without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast would round inside the reference's formula."""
    if autocast_dtype(tensor.device):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def _new_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, intervals, _, query_tiles, key_tiles, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, intervals, query_tiles, key_tiles)
    ctx.set_materialize_grads(False)  # lse seldom has a gradient: zeros would be written and read for nothing


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    grads = _attention_backward(grad_out, grad_lse, *saved, ctx.scale, ctx.impl)
    return (*grads, *[None] * 6)


_attention_backward = define(
    "attention_backward",
    _BACKWARD,
    _run_backward,
    lambda grad_out, grad_lse, q, k, v, *rest: tuple(new_like(t) for t in (q, k, v)),
)
_attention = define(
    "attention",
    _FORWARD,
    _run,
    lambda q, *rest: (new_like(q), _new_lse(q)),
    setup_context=_setup_context,
    backward=_differentiate,
)


def _refuse_vmap(*call: Any) -> Any:
    raise NotImplementedError(
        "transfusion_attention has no batching rule for torch.vmap: q, k and v have a batch dimension already; "
        "fold the mapped dimension into it, and the masks with IntervalMask.stack"
    )


for _name in ("attention", "attention_backward"):
    torch.library.register_vmap(f"transfusion::{_name}", _refuse_vmap)
