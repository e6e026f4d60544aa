"""S_ij = scale·q_i·k_j where query_start[j] <= i < query_end[j], else -inf;  P = softmax(S);  out = P v.

Derivative, with P_ij = exp(S_ij - lse_i) and δ_i = dout_i·out_i - dlse_i:

    dv = Pᵀ dout        dP = dout vᵀ        dS = P ∘ (dP - δ)        dq = scale·dS k        dk = scale·dSᵀ q

The formula and nothing else: O(N·M) memory. It computes in float32 (float64 for float64 inputs) unless
`compute_dtype` says otherwise; in the inputs' own dtype it is the eager baseline that bounds a kernel's error.
"""

import torch
from torch import Tensor

from transfusion.kernels.dispatch import new_like


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    scale: float,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k, v (B, H_kv, M, D), intervals (B or 1, M, 2) -> out like q, lse (B, H, N).

    lse is float32, for float64 inputs float64.
    """
    dtype = compute_dtype or _wide(q.dtype)
    scores, visible = _scores(q, k, intervals, scale, dtype)
    probabilities = scores.softmax(-1).masked_fill(~visible, 0)
    out = (probabilities @ v[:, :, None].to(dtype)).flatten(1, 2)
    return new_like(q).copy_(out), scores.logsumexp(-1).flatten(1, 2).to(_wide(q.dtype))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor,
    scale: float,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients like q, k, v, from the forward's results. Without grad_lse nothing depends on lse."""
    dtype = compute_dtype or _wide(q.dtype)
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    query, d_out, result = (t.to(dtype).unflatten(1, heads) for t in (q, grad_out, out))
    key, value = k[:, :, None].to(dtype), v[:, :, None].to(dtype)
    scores, visible = _scores(q, k, intervals, scale, dtype)
    logarithm = lse.unflatten(1, heads)[..., None]  # never in 16 bits, just as the forward keeps it
    probabilities = (scores - logarithm).exp().masked_fill(~visible, 0).to(dtype)
    delta = (d_out * result).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype).unflatten(1, heads)
    d_scores = probabilities * (d_out @ value.mT - delta[..., None])
    results = (
        (d_scores @ key * scale).flatten(1, 2),
        (d_scores.mT @ query * scale).sum(2),
        (probabilities.mT @ d_out).sum(2),
    )
    return tuple(new_like(like).copy_(x) for like, x in zip((q, k, v), results, strict=True))  # type: ignore[return-value]


def _scores(q: Tensor, k: Tensor, intervals: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S (B, H_kv, H / H_kv, N, M), -inf where invisible, and what is visible, broadcast over heads."""
    query = q.to(dtype).unflatten(1, (k.shape[1], -1))
    index = torch.arange(q.shape[2], device=q.device)[:, None]
    query_start, query_end = intervals.unbind(-1)
    visible = (query_start[:, None, :] <= index) & (index < query_end[:, None, :])
    visible = visible[:, None, None]
    return (query @ k[:, :, None].to(dtype).mT * scale).masked_fill(~visible, -torch.inf), visible


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
