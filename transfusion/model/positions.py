"""The tokens' positions, and how they rotate q and k: (q e^{i·a·m})·(k e^{i·a·n}) depends on m - n alone.

Rotary positions (arXiv 2104.09864), along the document or, for image tokens, on the image's grid.
"""

import math
from typing import Any

import torch
from torch import Tensor

from transfusion.config import ModelConfig, RopeScaling
from transfusion.kernels import RaggedLatents
from transfusion.kernels.registry import refuse_forward_mode
from transfusion.sequence import Batch


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """theta^(-2i/D), (D / 2,) float32, i = 0 .. D/2 - 1; with `rope_scaling`, as Llama 3.1 slows them."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    plain = config.rope_theta**-exponent
    return plain if config.rope_scaling is None else _slowed(plain, config.rope_scaling)


def _slowed(plain: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotary(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos, sin (B, N, 1, D / 2) float32 of position·frequency.

    positions: (B, N), or (B, N, 2), row and column of `grid_positions`: even i turn by the row, odd i by the column.
    """
    of_a_lane = positions.float()[..., None]
    if positions.ndim == 3:
        of_a_lane = of_a_lane.flatten(-2).repeat(1, 1, config.head_dim // 4)
    angle = of_a_lane * frequencies(config, positions.device)
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def grid_positions(positions: Tensor, index: Tensor, columns: Tensor | int) -> Tensor:
    """(s + y, s + x) of the image token in row y, column x of an image whose first token stands at s.

    So an image's tokens are rotated by their row and column; text tokens have s + k for both, as usual; and what
    follows an image keeps its place in the document. These are the two spatial axes of Qwen2-VL's M-RoPE (arXiv
    2409.12191, section 2.1), interleaved, without its renumbering of the text after an image.

    Args:
        positions: (...) int64, s + k of each image token.
        index: (...) int64, k: the token's number in its image, row by row.
        columns: tokens in a row of its image.

    Returns:
        (..., 2) int64.
    """
    first = positions - index
    return torch.stack([first + index // columns, first + index % columns], dim=-1)


def on_grid(batch: Batch, patch_size: int) -> Tensor:
    """The batch's positions (B, N, 2): both the place in the document for text, `grid_positions` for image tokens."""
    latents, area = batch.latents, patch_size**2
    index = torch.arange(batch.image_rows.numel(), device=batch.positions.device)
    if isinstance(latents, RaggedLatents):
        first_pixel, _, width, _ = latents.layout.planes.unbind(1)
        index = index - first_pixel[batch.token_image] // area
        columns = width[batch.token_image] // patch_size
    else:
        index = index % (latents.shape[-2] * latents.shape[-1] // area)
        columns = torch.full_like(index, latents.shape[-1] // patch_size)
    places = batch.positions.flatten()
    image = grid_positions(places[batch.image_rows], index, columns)
    both = places[:, None].expand(-1, 2)
    return both.index_copy(0, batch.image_rows, image).view(*batch.positions.shape, 2)


def one_image_on_grid(positions: Tensor, tokens: int, columns: int) -> Tensor:
    """Positions (B, N) whose first `tokens` are of one image -> (B, N, 2), as `on_grid` has them."""
    image = grid_positions(positions[:, :tokens], torch.arange(tokens, device=positions.device), columns)
    return torch.cat([image, positions[:, tokens:, None].expand(-1, -1, 2)], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, H, D), its halves the real and imaginary parts, rotated by the angle of each position: like x.

    Computed in float32 (float64 for float64 inputs) and rounded once.
    """
    # Compiled it is one pass, however it is written; of a Function torch 2.11 takes a wrong gradient.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        real, imaginary = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x.dtype)
    refuse_forward_mode("the model's rotary embedding", x)  # torch would name a Function, and no cure
    rotated: Tensor = _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """The gradient is rotated back, by the same op; autograd's of the formula would take twice as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In four passes over half of x, none of which writes more than it must: 14 bytes an element of 16 bits, not 48."""
    rotated = torch.empty_like(x)
    real, imaginary = x.chunk(2, dim=-1)
    new_real, new_imaginary = rotated.chunk(2, dim=-1)
    torch.addcmul(real * cos, imaginary, sin, value=-1, out=new_real)
    torch.addcmul(imaginary * cos, real, sin, out=new_imaginary)
    return rotated
