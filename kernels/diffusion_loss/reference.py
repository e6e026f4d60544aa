"""loss[i] = weight[i]·mean((prediction[i] - target[i])²): the formula and its derivative, nothing else.

target = data_weight[i]·latents[i] + noise_weight[i]·noise[i], which is `patchify_noise` with other weights. Computed
in float32, in float64 where the prediction or the latents are float64.
"""

import math

import torch
from torch import Tensor

from transfusion.kernels.patchify_noise import reference as patchify_noise
from transfusion.kernels.ragged_latents import Layout, image_of_token


def forward(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """-> (I,) float32 or float64."""
    squares = _difference(prediction, latents, data_weight, noise_weight, noise, seed, patch_size, layout).square()
    if layout is None:
        mean = squares.flatten(1).mean(1)  # flat, so that the order of the sum is that of the tokens
    else:
        pixels = layout.planes[:, 1]
        # It adds one token after another, which in float32 would lose digits of a large image.
        wide = squares.sum(1, dtype=torch.float64)
        total = torch.segment_reduce(wide, "sum", lengths=pixels // patch_size**2, unsafe=True)
        mean = (total / (pixels * layout.channels)).to(squares.dtype)
    return mean if weight is None else weight.to(mean.dtype) * mean


def backward(
    grad_loss: Tensor,
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    patch_size: int,
    layout: Layout | None = None,
) -> Tensor:
    """grad_prediction = grad_loss[i]·weight[i]·2·(prediction - target)/(C·h·w), shape and dtype of `prediction`."""
    difference = _difference(prediction, latents, data_weight, noise_weight, noise, seed, patch_size, layout)
    scale = 2.0 * grad_loss.to(difference.dtype)
    if weight is not None:
        scale = scale * weight.to(difference.dtype)
    if layout is None:
        scale = (scale / math.prod(latents.shape[1:])).view(-1, 1, 1)
    else:
        scale = scale / (layout.planes[:, 1] * layout.channels)
        scale = scale[image_of_token(layout, patch_size, len(prediction))][:, None]
    return (scale * difference).to(prediction.dtype).contiguous()


def _difference(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
    layout: Layout | None,
) -> Tensor:
    compute = torch.float64 if torch.float64 in (prediction.dtype, latents.dtype) else torch.float32
    target = patchify_noise.forward(
        latents.to(compute), data_weight, noise_weight, noise, seed, compute, patch_size, layout
    )
    return prediction.to(compute) - target
