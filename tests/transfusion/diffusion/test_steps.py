"""Steps of DDPM, DDIM and Euler against diffusers' `step`, at every timestep, through `denoise_step`."""

import math
import random

import pytest
import torch
from cosine import alphas_cumprod_gold
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.diffusion.steps import StepCoefficients, ddim_step, ddpm_step, euler_step
from transfusion.kernels import denoise_step
from transfusion.kernels.patchify_noise.reference import patchify
from transfusion.kernels.testing import judge

SHAPE = (1, 2, 16, 16)


def draws(count: int) -> list[Tensor]:
    seed = random.randrange(2**32)
    print(f"input seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def stepped(coefficients: StepCoefficients, prediction: Tensor, latents: Tensor, noise: Tensor | None = None) -> Tensor:
    given = {} if noise is None else {"noise": noise}
    return denoise_step(patchify(prediction, 2), latents, coefficients.tensor(), 2, **given)


def exact(scheduler: DDIMScheduler | DDPMScheduler) -> None:
    """Makes the scheduler compute in float64, from the definition."""
    scheduler.betas, scheduler.alphas_cumprod = alphas_cumprod_gold(1000)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)


@pytest.mark.parametrize(("steps", "clip"), [(1000, None), (50, None), (50, 0.8)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm(prediction_type: str, clip: float | None, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule(prediction_type)
    latents, prediction, noise = draws(3)
    drawn = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(drawn, lambda shape, **options: noise.to(options["dtype"]))
    options = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "prediction_type": prediction_type}
    eager, gold = (DDPMScheduler(beta_schedule="squaredcos_cap_v2", **options) for _ in range(2))
    exact(gold)
    for scheduler in (eager, gold):
        scheduler.set_timesteps(steps)
    for t in eager.timesteps.tolist():
        ours = stepped(ddpm_step(schedule, t, max(t - 1000 // steps, -1), clip), prediction, latents, noise)
        theirs = eager.step(prediction, t, latents).prev_sample
        right = gold.step(prediction.double(), t, latents.double()).prev_sample
        assert right.dtype == torch.float64
        verdict = judge(ours, theirs, right, factor=1.0)
        assert verdict.passed, (t, verdict)


@pytest.mark.parametrize(
    ("steps", "eta", "clip"), [(1000, 0.0, None), (50, 0.0, 0.8), (50, 0.7, None), (50, 1.0, None), (50, 1.0, 0.8)]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim(prediction_type: str, clip: float | None, steps: int, eta: float) -> None:
    schedule = NoiseSchedule(prediction_type)
    latents, prediction, noise = draws(3)
    options = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "prediction_type": prediction_type}
    eager, gold = (DDIMScheduler(beta_schedule="squaredcos_cap_v2", **options) for _ in range(2))
    exact(gold)

    def theirs(scheduler: DDIMScheduler, t: int, dtype: torch.dtype) -> Tensor:
        tensors = prediction.to(dtype), t, latents.to(dtype)
        random_part = {"eta": eta, "variance_noise": noise.to(dtype)} if eta else {}
        return scheduler.step(*tensors, use_clipped_model_output=clip is not None, **random_part).prev_sample

    for scheduler in (eager, gold):
        scheduler.set_timesteps(steps)
    for t in eager.timesteps.tolist():
        ours = stepped(ddim_step(schedule, t, max(t - 1000 // steps, -1), eta, clip), prediction, latents, noise)
        right = theirs(gold, t, torch.float64)
        assert right.dtype == torch.float64
        verdict = judge(ours, theirs(eager, t, torch.float32), right, factor=1.0)
        assert verdict.passed, (t, verdict)


def test_euler() -> None:
    schedule = NoiseSchedule("flow_prediction")
    latents, prediction = draws(2)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / 100 for step in range(100)])
    sigmas = [1 - step / 100 for step in range(100)] + [0.0]
    for t, now, following in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        ours = stepped(euler_step(schedule, 1000 * now, 1000 * following), prediction, latents)
        theirs = scheduler.step(prediction, t, latents).prev_sample
        right = latents.double() + (following - now) * prediction.double()
        verdict = judge(ours, theirs, right, factor=1.0)
        assert verdict.passed, (t, verdict)


def test_a_step_to_the_clean_latent_is_the_estimate() -> None:
    latents, prediction, noise = draws(3)
    alpha, sigma, *_ = (c.view(-1, 1, 1, 1) for c in NoiseSchedule("v_prediction").coefficients(torch.tensor([500])))
    estimate = alpha.double() * latents.double() - sigma.double() * prediction.double()
    eager = alpha * latents - sigma * prediction
    result = stepped(ddim_step(NoiseSchedule("v_prediction"), 500, -1, eta=1.0), prediction, latents, noise)
    verdict = judge(result, eager, estimate, factor=1.0)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ddpm_step(NoiseSchedule("flow_prediction"), 5, 4),
            "ddpm_step is of the cosine path; 'flow_prediction'",
        ),
        (lambda: ddim_step(NoiseSchedule("trigflow"), 5, 4), "ddim_step is of the cosine path; 'trigflow'"),
        (lambda: euler_step(NoiseSchedule(), 5, 4), "euler_step is of the flow path; 'epsilon'"),
        (lambda: ddpm_step(NoiseSchedule(), 5, 5), "from timestep 5 to 5"),
        (lambda: ddim_step(NoiseSchedule(), 1000, 5), "from timestep 1000 to 5"),
        (lambda: ddim_step(NoiseSchedule(), 5, -2), "from timestep 5 to -2"),
        (lambda: euler_step(NoiseSchedule("flow_prediction"), 5, -1), "from timestep 5 to -1"),
        (lambda: ddim_step(NoiseSchedule(), 5, 4, eta=1.5), "eta=1.5"),
        (lambda: ddpm_step(NoiseSchedule(), 5, 4, clip=0.0), r"clip=0\.0"),
    ],
)
def test_refuses_what_is_no_step(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_coefficients_are_finite_to_the_ends() -> None:
    for t in (0, 1, 998, 999):
        for step in (ddpm_step, ddim_step):
            assert all(map(math.isfinite, step(NoiseSchedule(), t, t - 1, clip=1.0)))
