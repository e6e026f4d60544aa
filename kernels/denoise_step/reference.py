"""next = a·x + b·g + d·clamp(p·x + q·g, ±limit) + c·z,  g = u + w·(v - u) in pixel order: the formula, nothing else.

Computed in float32, in float64 where the latents are float64.
"""

import torch
from torch import Tensor

from transfusion.kernels.patchify_noise.reference import unpatchify
from transfusion.kernels.philox import randn
from transfusion.kernels.ragged_latents import Layout, image_of_element, token_sources


def forward(
    prediction: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> like the latents, (I, C, h, w) or (E,), contiguous."""
    compute = torch.float64 if latents.dtype == torch.float64 else torch.float32
    x = latents.to(compute)
    a, b, d, c, p, q, limit = coefficients.to(compute).unbind()
    guided = _in_latent_order(prediction.to(compute), latents, patch_size, layout)
    if unconditional is not None and guidance is not None:
        base = _in_latent_order(unconditional.to(compute), latents, patch_size, layout)
        guided = base + _per_image(guidance.to(compute), latents, layout) * (guided - base)
    estimate = torch.clamp(p * x + q * guided, -limit, limit)
    result = a * x + b * guided + d * estimate
    if seed is not None:
        noise = randn(latents.shape, seed, dtype=compute)
    if noise is not None:
        result = result + c * noise.to(compute)
    return result.to(latents.dtype).contiguous()


def _in_latent_order(tokens: Tensor, latents: Tensor, patch_size: int, layout: Layout | None) -> Tensor:
    if layout is None:
        return unpatchify(tokens, latents.shape, patch_size)
    values = tokens.new_empty(latents.shape)
    values[token_sources(layout, patch_size, len(tokens))] = tokens
    return values


def _per_image(weight: Tensor, latents: Tensor, layout: Layout | None) -> Tensor:
    return weight.view(-1, 1, 1, 1) if layout is None else weight[image_of_element(layout, latents.shape[0])]
