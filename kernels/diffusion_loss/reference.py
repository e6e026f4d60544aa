"""loss[i] = mean((prediction[i] - target[i])²): the formula and its derivative, nothing else.

target = data_weight[i]·latents[i] + noise_weight[i]·noise[i], which is `patchify_noise` with other weights. Computed
in float32, in float64 where the prediction or the latents are float64.
"""

import math

import torch
from torch import Tensor

from transfusion.kernels.patchify_noise import reference as patchify_noise


def forward(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
) -> Tensor:
    """-> (I,) float32 or float64."""
    difference = _difference(prediction, latents, data_weight, noise_weight, noise, seed, patch_size)
    return difference.square().flatten(1).mean(1)  # flat, so that the order of the sum is that of the tokens


def backward(
    grad_loss: Tensor,
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
) -> Tensor:
    """grad_prediction = grad_loss[i]·2·(prediction - target)/(n·P·P·C), shape and dtype of `prediction`."""
    difference = _difference(prediction, latents, data_weight, noise_weight, noise, seed, patch_size)
    scale = 2.0 * grad_loss.to(difference.dtype) / math.prod(latents.shape[1:])
    return (scale.view(-1, 1, 1) * difference).to(prediction.dtype).contiguous()


def _difference(
    prediction: Tensor,
    latents: Tensor,
    data_weight: Tensor,
    noise_weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    patch_size: int,
) -> Tensor:
    compute = torch.float64 if torch.float64 in (prediction.dtype, latents.dtype) else torch.float32
    target = patchify_noise.forward(
        latents.to(compute), data_weight, noise_weight, noise, seed, patch_size, dtype=compute
    )
    return prediction.to(compute) - target
