"""noisy = alpha·x + sigma·noise,  target = data_weight·x + noise_weight·noise,  as functions of the timestep.

`prediction` names what the network predicts, in diffusers' words, and with it the path from data to noise:

    prediction       path     alpha      sigma            target                             timestep
    epsilon          cosine   sqrt(ᾱ_t)  sqrt(1 - ᾱ_t)    noise                              0 .. T-1, int64
    v_prediction     cosine   sqrt(ᾱ_t)  sqrt(1 - ᾱ_t)    alpha·noise - sigma·x              0 .. T-1, int64
    flow_prediction  flow     1 - t/T    t/T              noise - x                          [0, T), float32
    trigflow         trigflow cos t      sigma_data·sin t cos t·noise - sin t·x/sigma_data   [0, π/2), float32

The noise is standard normal. Units and coefficients are those of diffusers' DDPMScheduler ("squaredcos_cap_v2"),
FlowMatchEulerDiscreteScheduler and SCMScheduler.

Sources: Ho et al. 2020 with the cosine schedule of Nichol & Dhariwal 2021 (Transfusion, section 2.2); v-prediction of
Salimans & Ho 2022; rectified flow of Liu et al. 2023; TrigFlow of Lu & Song 2024 (arXiv 2410.11081, section 3).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from transfusion.kernels.registry import whole

Prediction = Literal["epsilon", "v_prediction", "flow_prediction", "trigflow"]
Path = Literal["cosine", "flow", "trigflow"]

_COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal: keeps beta from vanishing near t = 0
_MAX_BETA = 0.999  # met by the last step alone, where ᾱ would be zero


class Coefficients(NamedTuple):
    """Four (I,) float32 tensors on the timestep's device."""

    alpha: Tensor
    sigma: Tensor
    data_weight: Tensor
    noise_weight: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """What the network predicts, and the path that it predicts it on. The paper's is the default.

    Args:
        prediction: "epsilon", "v_prediction", "flow_prediction" or "trigflow".
        num_train_timesteps: T, the unit of time of the cosine and flow paths; TrigFlow's unit is the radian.
        sigma_data: standard deviation of the latents, which TrigFlow alone scales the noise by; sCM's 0.5.

    Raises:
        ValueError: an unknown prediction, or a number that is not positive and finite.
        TypeError: num_train_timesteps that is no whole number.
    """

    prediction: Prediction = "epsilon"
    num_train_timesteps: int = 1000
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction={self.prediction!r} is not one of {', '.join(get_args(Prediction))}")
        whole("num_train_timesteps", self.num_train_timesteps, 1)
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data={self.sigma_data} must be positive and finite")

    @property
    def path(self) -> Path:
        """The path from data to noise that belongs to the prediction."""
        if self.prediction == "flow_prediction":
            return "flow"
        return "trigflow" if self.prediction == "trigflow" else "cosine"

    @property
    def timestep_range(self) -> float:
        """The timestep at which only noise is left: T, or π/2 for TrigFlow."""
        return math.pi / 2 if self.path == "trigflow" else float(self.num_train_timesteps)

    def timestep(self, time: Tensor) -> Tensor:
        """Time (I,) in [0, 1), data to noise -> the (I,) timestep that diffusers passes to a network of this kind.

        int64 min(floor(time·T), T - 1) on the cosine path, time·T on the flow path, time·π/2 for TrigFlow.
        """
        if not time.dtype.is_floating_point:
            raise TypeError(f"time must be floating point in [0, 1), got {time.dtype}; is it already a timestep?")
        if self.path == "cosine":
            return (time * self.num_train_timesteps).to(torch.int64).clamp(max=self.num_train_timesteps - 1)
        return time * (self.num_train_timesteps if self.path == "flow" else math.pi / 2)

    def coefficients(self, timestep: Tensor) -> Coefficients:
        """The four coefficients at each timestep (I,), without a host sync.

        Raises `TypeError` where the timestep is not of the kind that `timestep` returns. Its range is not checked.
        """
        if timestep.dtype.is_floating_point == (self.path == "cosine"):
            wanted = "int64" if self.path == "cosine" else "floating point"
            raise TypeError(f"the timestep of {self.prediction!r} must be {wanted}, got {timestep.dtype}")
        if self.path == "flow":
            sigma = timestep.float() / self.num_train_timesteps
            one = torch.ones_like(sigma)
            return Coefficients(1 - sigma, sigma, -one, one)
        if self.path == "trigflow":
            cos, sin = torch.cos(timestep.float()), torch.sin(timestep.float())
            return Coefficients(cos, self.sigma_data * sin, sin / -self.sigma_data, cos)
        alpha, sigma = cosine_path(timestep, self.num_train_timesteps)
        if self.prediction == "v_prediction":
            return Coefficients(alpha, sigma, -sigma, alpha)
        return Coefficients(alpha, sigma, torch.zeros_like(alpha), torch.ones_like(alpha))

    def min_snr_weight(self, timestep: Tensor, gamma: float = 5.0) -> Tensor:
        """(I,) float32 weight of each image's loss that makes it min(SNR, gamma) times the error of the clean latent.

        The estimate of the clean latent that a prediction implies is off by sigma / (alpha·noise_weight -
        sigma·data_weight) times the prediction's error. SNR = alpha²·var(x) / sigma², with the latents' variance
        sigma_data² for TrigFlow and 1 otherwise. For epsilon the weight is min(1, gamma / SNR), for v_prediction
        min(SNR, gamma) / (SNR + 1). No host sync.

        Source: Hang et al. 2023 (arXiv 2303.09556, section 3.4), whose gamma is 5. Raises `ValueError` unless gamma is
        positive, and `TypeError` as `coefficients` does.
        """
        if not gamma > 0:
            raise ValueError(f"gamma={gamma} must be positive")
        alpha, sigma, data_weight, noise_weight = self.coefficients(timestep)
        deviation = self.sigma_data if self.path == "trigflow" else 1.0
        implied = deviation * (alpha * noise_weight - sigma * data_weight)
        return torch.minimum((deviation * alpha).square(), gamma * sigma.square()) / implied.square()


def cosine_path(
    timestep: Tensor, num_train_timesteps: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(sqrt(ᾱ_t), sqrt(1 - ᾱ_t)) `dtype` for t (I,) int64: ᾱ_t = Π_{k<=t} (1 - beta_k), beta <= 0.999.

    With 1 - beta_k = f(k + 1)/f(k), f(k) = cos²((k/T + s)/(1 + s)·π/2), the product telescopes to f(t + 1)/f(0); only
    the last step meets the limit on beta, because f(T) = 0. So no table is needed, and cos θ = sin(π/2 - θ) and
    cos²θ0 - cos²θ = sin(θ - θ0)·sin(θ + θ0) keep every digit of `dtype` at both ends of the path.
    """
    step = math.pi / 2 / (1 + _COSINE_OFFSET) / num_train_timesteps
    theta0 = _COSINE_OFFSET * num_train_timesteps * step
    last = timestep == num_train_timesteps - 1
    k = (timestep + 1).clamp(max=num_train_timesteps - 1).to(dtype)
    alpha = torch.sin(step * (num_train_timesteps - k)) / math.cos(theta0)
    sigma = torch.sqrt(torch.sin(step * k) * torch.sin(step * k + 2 * theta0)) / math.cos(theta0)
    alpha = torch.where(last, alpha * math.sqrt(1 - _MAX_BETA), alpha)
    return alpha, torch.where(last, torch.sqrt(1 - alpha.square()), sigma)
