"""The cosine path from its definition, for the tests of schedules and of steps."""

import math

import torch
from torch import Tensor


def alphas_cumprod_gold(num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """beta and ᾱ in float64, from the definition: squaredcos_cap_v2 without its rounding to float32."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_train_timesteps)
    ratios = [alpha_bar((k + 1) / num_train_timesteps) / alpha_bar(k / num_train_timesteps) for k in steps]
    betas = torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=torch.float64)
    return betas, (1 - betas).cumprod(0)
