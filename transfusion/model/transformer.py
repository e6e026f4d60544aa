"""x += attention(norm(x));  x += down(silu(gate(norm(x))) ∘ up(norm(x))): Llama's block under an interval mask.

Dtypes: weights are kept in float32 and trained under bfloat16 autocast. Then matrix products run in bfloat16, while
the residual stream x, RMSNorm and the rotation of q and k are computed in float32; attention accumulates in float32.
Norm, SwiGLU and rotation are plain torch, which torch.compile fuses.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.kernels import IntervalMask, prepare_attention, transfusion_attention
from transfusion.model.linear import Linear, swiglu
from transfusion.model.positions import rotary, rotate

Attend = Callable[[Tensor, Tensor, Tensor, str], Tensor]


class Cache(Protocol):
    """Keys and values of earlier tokens; implemented in `transfusion.generation.cache`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        """Stores k, v (B, H_kv, N, D) of the new tokens -> attention of q (B, H, N, D) over all it then holds."""


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight (float32 under autocast too), returned in that of x."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; one projection makes q, k and v. QK-norm is Qwen3's, per head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(config.dim, config.dim)
        self.q_norm, self.k_norm = (
            HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else None for _ in range(2)
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: IntervalMask, impl: str, attend: Attend | None = None
    ) -> Tensor:
        """x (B, N, dim) -> (B, N, dim); `attend` replaces attention under `mask`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        turning, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turning.split([self.heads, self.kv_heads], dim=2)
            turning = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        q, k = rotate(turning, cos, sin).transpose(1, 2).split([self.heads, self.kv_heads], dim=1)
        v = v.transpose(1, 2)
        attended = attend(q, k, v, impl) if attend is not None else transfusion_attention(q, k, v, mask, impl=impl)
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) ∘ up(x)); one projection makes gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        return self.down(swiglu(self.gate_up, x))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: IntervalMask, impl: str, attend: Attend | None = None
    ) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, impl, attend)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Blocks and a final norm. It treats tokens of both modalities alike."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, mask: IntervalMask, impl: str = "auto", cache: Cache | None = None
    ) -> Tensor:
        """x (B, N, dim), positions (B, N) int64 within each document, or (B, N, 2) -> hidden (B, N, dim).

        With a cache, x are new tokens, and the cache's own mask, which covers the earlier tokens too, replaces `mask`.
        """
        cos, sin = rotary(positions, self.config)
        if cache is None:  # here, for a compiled block under checkpointing may only read what is kept with the mask
            heads, kv_heads, head_dim = self.config.heads, self.config.num_kv_heads, self.config.head_dim
            sizes = {"batch": x.shape[0], "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
            trains = torch.is_grad_enabled() and (x.requires_grad or self.norm.weight.requires_grad)
            prepare_attention(mask, dtype=x.dtype, needs_grad=trains, impl=impl, **sizes)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, impl, None if cache is None else partial(cache.attend, layer))
        return self.norm(x)
