"""next = a·x + b·g + d·clamp(p·x + q·g, ±limit) + c·z: the steps of DDPM, DDIM and Euler as coefficients of one line.

x are the latents, g the network's (guided) prediction, z standard normal noise. The coefficients come from the
`NoiseSchedule` in float64 and are rounded once; `transfusion.kernels.denoise_step` computes the line. They are those of
`step` of diffusers' DDPMScheduler (variance_type "fixed_small"), DDIMScheduler and FlowMatchEulerDiscreteScheduler.

Sources: Ho et al. 2020 (arXiv 2006.11239, equation 7); Song et al. 2021 (arXiv 2010.02502, equations 12 and 16).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from transfusion.diffusion.schedule import NoiseSchedule, cosine_path

_MIN_VARIANCE = 1e-20  # diffusers' floor under DDPM's variance


class StepCoefficients(NamedTuple):
    """(a, b, d, c, p, q, limit): of the latents, the prediction, the clipped estimate of the clean latent and the
    noise; and that estimate's own two, with the limit it is held to."""

    latents: float
    prediction: float
    estimate: float
    noise: float
    estimate_latents: float
    estimate_prediction: float
    limit: float

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """(7,) float32, as `denoise_step` reads it."""
        return torch.tensor(self, dtype=torch.float32, device=device)


def ddpm_step(schedule: NoiseSchedule, timestep: int, previous: int, clip: float | None = None) -> StepCoefficients:
    """The posterior's mean and a draw from it: timestep -> previous < timestep, -1 being the clean latent.

    The variance is the posterior's, and at timestep 0 there is no noise. `clip` holds the estimate of the clean latent
    to ±clip.

    Raises:
        ValueError: a schedule of another path, or timesteps out of order or range.
    """
    alpha, sigma, alpha_previous, sigma_previous = _ends(schedule, timestep, previous, "ddpm_step")
    kept = (alpha / alpha_previous) ** 2
    added = _added(alpha, sigma, alpha_previous, sigma_previous)
    estimate = alpha_previous * added / sigma**2
    own = math.sqrt(kept) * (sigma_previous / sigma) ** 2
    noise = math.sqrt(max((sigma_previous / sigma) ** 2 * added, _MIN_VARIANCE)) if timestep > 0 else 0.0
    return _assembled(schedule, alpha, sigma, own, estimate, noise, clip)


def ddim_step(
    schedule: NoiseSchedule, timestep: int, previous: int, eta: float = 0.0, clip: float | None = None
) -> StepCoefficients:
    """The estimate of the clean latent, noised again to `previous` (-1: not at all), eta of it with fresh noise.

    With `clip` the noise direction is the one that agrees with the clipped estimate (diffusers'
    use_clipped_model_output), so that the two still add up to the latents.

    Raises:
        ValueError: a schedule of another path, timesteps out of order or range, or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be within [0, 1]: 0 is deterministic, 1 has DDPM's noise")
    alpha, sigma, alpha_previous, sigma_previous = _ends(schedule, timestep, previous, "ddim_step")
    noise = eta * sigma_previous / sigma * math.sqrt(_added(alpha, sigma, alpha_previous, sigma_previous))
    # a rounding below zero where eta = 1 takes all of the noise
    direction = math.sqrt(max(sigma_previous**2 - noise**2, 0.0)) / sigma
    return _assembled(schedule, alpha, sigma, direction, alpha_previous - alpha * direction, noise, clip)


def euler_step(schedule: NoiseSchedule, timestep: float, previous: float) -> StepCoefficients:
    """next = x + (previous - timestep) / T·g: Euler's step along the flow; timesteps in [0, T], previous < timestep.

    Raises:
        ValueError: a schedule of another path, or timesteps out of order or range.
    """
    total = schedule.num_train_timesteps
    if schedule.path != "flow":
        raise ValueError(f"euler_step is of the flow path; {schedule.prediction!r} is on the {schedule.path} path")
    if not 0 <= previous < timestep <= total:
        raise ValueError(f"a step from timestep {timestep} to {previous} is not within {total} .. 0, downwards")
    return StepCoefficients(1.0, (previous - timestep) / total, 0.0, 0.0, 0.0, 0.0, math.inf)


def _ends(schedule: NoiseSchedule, timestep: int, previous: int, name: str) -> tuple[float, float, float, float]:
    """alpha and sigma at `timestep` and at `previous`, in float64."""
    total = schedule.num_train_timesteps
    if schedule.path != "cosine":
        raise ValueError(f"{name} is of the cosine path; {schedule.prediction!r} is on the {schedule.path} path")
    if not -1 <= previous < timestep < total:
        raise ValueError(f"a step from timestep {timestep} to {previous} is not within {total - 1} .. -1, downwards")
    with unset_fake_temporarily():  # numbers of the host, whatever tensors are stand-ins
        alpha, sigma = cosine_path(torch.tensor([timestep, max(previous, 0)], device="cpu"), total, torch.float64)
        (alpha_now, alpha_previous), (sigma_now, sigma_previous) = alpha.tolist(), sigma.tolist()
    if previous < 0:
        alpha_previous, sigma_previous = 1.0, 0.0
    return alpha_now, sigma_now, alpha_previous, sigma_previous


def _added(alpha: float, sigma: float, alpha_previous: float, sigma_previous: float) -> float:
    """1 - ᾱ_t / ᾱ_previous, from the sigmas: the difference of two numbers near one would lose its digits."""
    return (sigma + sigma_previous) * (sigma - sigma_previous) / alpha_previous**2


def _assembled(
    schedule: NoiseSchedule,
    alpha: float,
    sigma: float,
    latents: float,
    estimate: float,
    noise: float,
    clip: float | None,
) -> StepCoefficients:
    """latents·x + estimate·x̂ + noise·z with x̂ = p·x + q·g, folded into x and g where nothing clips."""
    p, q = (alpha, -sigma) if schedule.prediction == "v_prediction" else (1 / alpha, -sigma / alpha)
    if clip is None:
        return StepCoefficients(latents + estimate * p, estimate * q, 0.0, noise, 0.0, 0.0, math.inf)
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive, or None")
    return StepCoefficients(latents, 0.0, estimate, noise, p, q, clip)
