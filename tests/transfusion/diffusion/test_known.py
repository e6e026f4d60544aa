"""Denoising of which a part is given: inpainting, without a network."""

import pytest
import torch

from transfusion.diffusion.sampler import Known, make_scheduler, sample, timesteps
from transfusion.diffusion.schedule import NoiseSchedule

CASES = [
    ("epsilon", "ddim"),
    ("epsilon", "ddpm"),
    ("v_prediction", "ddim"),
    ("v_prediction", "dpmsolver"),
    ("flow_prediction", "euler"),
    ("trigflow", "scm"),
]
SHAPE = (2, 3, 4, 4)


def run(predict, noise, schedule, scheduler, seed, **options):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(noise))]
    return sample(predict, noise, schedule=schedule, scheduler=scheduler, steps=5, generators=generators, **options)


@pytest.mark.parametrize(("prediction", "name"), CASES)
def test_what_is_known_stays_on_its_own_path(prediction, name, seed):
    """At every step the known part that the network sees is alpha·latent + sigma·noise; at the end it is the latent."""
    schedule = NoiseSchedule(prediction)
    torch.manual_seed(seed)
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    unknown = torch.rand(SHAPE[0], 1, *SHAPE[2:]) > 0.5
    kept, seen = ~unknown.expand(SHAPE), []

    def predict(latents, timestep):
        seen.append((latents, timestep))
        return latents.tanh()

    result = run(predict, noise, schedule, make_scheduler(schedule, name), seed, known=Known(clean, unknown))
    assert torch.equal(result[kept], clean[kept]) and not torch.equal(result[~kept], clean[~kept])
    theirs = make_scheduler(schedule, name)
    moments = timesteps(theirs, schedule, 5)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(None)  # it takes no step here, so it looks each timestep up
    for (latents, timestep), moment in zip(seen, moments, strict=True):
        alpha, sigma, *_ = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(timestep))
        times = moment.expand(SHAPE[0])
        if hasattr(theirs, "add_noise"):
            expected = theirs.add_noise(clean, noise, times)
        elif hasattr(theirs, "scale_noise"):
            expected = theirs.scale_noise(clean, times, noise)
        else:
            expected = alpha * clean + sigma * noise
        assert torch.equal(latents[kept], expected[kept]), (seed, timestep)
    assert len(seen) == 5


def test_nothing_known_changes_nothing(seed):
    schedule = NoiseSchedule("v_prediction")
    torch.manual_seed(seed)
    noise, everything = torch.randn(SHAPE), torch.ones(SHAPE[0], 1, *SHAPE[2:], dtype=torch.bool)
    free, painted = (
        run(lambda x, t: x.tanh(), noise, schedule, make_scheduler(schedule), seed, known=known)
        for known in (None, Known(torch.randn(SHAPE), everything))
    )
    assert torch.equal(free, painted), seed
