"""Numbers of steps that fit, and schedulers of diffusers at the edge of what `sample` can run."""

import diffusers
import pytest
import torch

from transfusion.diffusion.sampler import SCHEDULERS, Known, default_steps, make_scheduler, sample, timesteps
from transfusion.diffusion.schedule import NoiseSchedule

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
MEAN, DEVIATION = 0.3, 0.25


@pytest.mark.parametrize("total", [1, 2, 30, 999, 1000, 1009, 1024])
def test_default_steps_are_taken(total):
    for prediction in ("epsilon", "v_prediction", "flow_prediction"):
        schedule = NoiseSchedule(prediction, num_train_timesteps=total)
        for name, kind in SCHEDULERS.items():
            if kind.path != schedule.path:
                continue
            for about in (None, 20):
                steps = default_steps(schedule, name, about)
                assert timesteps(make_scheduler(schedule, name), schedule, steps).numel()
                if total == 1000:
                    assert steps == (about or kind.steps)


def test_a_scheduler_tells_its_usual_steps_by_its_class():
    schedule = NoiseSchedule("v_prediction")
    assert default_steps(schedule, make_scheduler(schedule, "dpmsolver")) == 20
    assert default_steps(schedule, make_scheduler(schedule, "ddpm")) == 250
    assert default_steps(schedule, diffusers.UniPCMultistepScheduler(**COSINE)) == 50


def oracle(schedule):
    """The exact prediction where every number of a latent is normal."""

    def predict(latents, timestep):
        alpha, sigma, *_ = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(timestep))
        clean = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (latents - alpha * MEAN)
        return alpha * (latents - alpha * clean) / sigma - sigma * clean

    return predict


def drawn(scheduler, steps=20, known=None):
    schedule = NoiseSchedule("v_prediction")
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    options = {"schedule": schedule, "scheduler": scheduler, "steps": steps, "generators": generators, "known": known}
    return sample(oracle(schedule), noise, **options)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"]
)
def test_timesteps_that_repeat(name):
    """Karras' sigmas round to equal timesteps; the first of them is where the path begins."""
    latents = drawn(getattr(diffusers, name)(**COSINE, use_karras_sigmas=True))
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert latents.std().item() == pytest.approx(DEVIATION, abs=0.1)


def test_a_scheduler_that_must_be_told_more_is_refused():
    with pytest.raises(ValueError, match="UnCLIPScheduler must be told the next timestep"):
        drawn(diffusers.UnCLIPScheduler(prediction_type="epsilon", clip_sample=False))


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_a_scheduler_whose_noise_is_another_cannot_inpaint(name):
    scheduler = getattr(diffusers, name)(**COSINE)
    known = Known(torch.zeros(4, 3, 32, 32), torch.ones(4, 1, 32, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"{name} cannot inpaint"):
        drawn(scheduler, known=known)
    assert drawn(scheduler).isfinite().all()


def test_a_scheduler_that_overflows_is_not_taken_for_the_network():
    schedule = NoiseSchedule("v_prediction")
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **COSINE)
    with pytest.raises(FloatingPointError, match=r"EulerAncestralDiscreteScheduler hands to denoising step 2 of 3"):
        sample(
            oracle(schedule),
            torch.randn(1, 1, 4, 4),
            schedule=schedule,
            scheduler=scheduler,
            steps=3,
            generators=[torch.Generator()],
        )


def test_what_a_callback_gives_goes_on_in_float32_and_without_its_gradient():
    schedule, weight = NoiseSchedule("v_prediction"), torch.ones((), dtype=torch.float64, requires_grad=True)
    options = {"schedule": schedule, "scheduler": make_scheduler(schedule), "steps": 4}
    seen = []

    def predict(latents, timestep):
        seen.append((latents.dtype, latents.requires_grad))
        return latents.tanh()

    def steer(step, timestep, latents):
        with torch.enable_grad():
            return latents.double() * weight

    noise = torch.randn(2, 3, 4, 4)
    found = sample(predict, noise, generators=[torch.Generator()] * 2, on_step_end=steer, **options)
    assert set(seen) == {(torch.float32, False)} and found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, sample(predict, noise, generators=[torch.Generator()] * 2, **options))
