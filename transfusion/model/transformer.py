"""x += attention(norm(x));  x += down(silu(gate(norm(x))) ∘ up(norm(x))): Llama's block under an interval mask."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from transfusion.config import ModelConfig
from transfusion.kernels import IntervalMask, transfusion_attention


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin (B, N, 1, D / 2) float32 of position·theta^(-2i/D)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, H, D), its halves the real and imaginary parts, turned by the angle of each position."""
    real, imaginary = x.float().chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; one projection makes q, k and v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: IntervalMask, impl: str) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = transfusion_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, impl=impl)
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) ∘ up(x)); one projection makes gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: IntervalMask, impl: str) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, impl)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Blocks and a last norm. Tokens of either modality look the same from in here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, mask: IntervalMask, impl: str = "auto") -> Tensor:
        """x (B, N, dim), positions (B, N) int64 within each document -> hidden (B, N, dim)."""
        cos, sin = rotary(positions, self.head_dim, self.rope_theta)
        for block in self.blocks:
            x = block(x, cos, sin, mask, impl)
        return self.norm(x)
