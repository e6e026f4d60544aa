"""Schedulers that fit the schedule they are made for, and a loop that is diffusers' own."""

import copy
import inspect
import itertools
import math

import diffusers
import pytest
import torch

from transfusion.diffusion.sampler import (
    SCHEDULERS,
    can_clip,
    check_scheduler,
    default_steps,
    make_scheduler,
    sample,
    timesteps,
)
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.kernels.testing import judge

CASES = [
    ("epsilon", "ddim"),
    ("epsilon", "ddpm"),
    ("epsilon", "dpmsolver"),
    ("v_prediction", "ddim"),
    ("v_prediction", "ddpm"),
    ("v_prediction", "dpmsolver"),
    ("flow_prediction", "euler"),
    ("trigflow", "scm"),
]
SHAPE = (2, 3, 4, 4)


def generators(seed, count=SHAPE[0]):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def run(predict, noise, schedule, scheduler, seed, steps=5, **options):
    made = generators(seed, len(noise))
    return sample(predict, noise, schedule=schedule, scheduler=scheduler, steps=steps, generators=made, **options)


def perfect(schedule, clean):
    """The prediction of a network that knows the clean latents."""

    def predict(noisy, timestep):
        alpha, sigma, data_weight, noise_weight = (
            c.view(-1, 1, 1, 1).to(noisy) for c in schedule.coefficients(timestep)
        )
        return data_weight * clean + noise_weight * (noisy - alpha * clean) / sigma

    return predict


def by_hand(predict, noise, schedule, scheduler, seed, steps=5):
    """The loop of diffusers' pipelines, written plainly."""
    scheduler, made = copy.deepcopy(scheduler), generators(seed, len(noise))
    unit = 1.0
    if schedule.path == "flow" and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
    elif schedule.path == "trigflow":
        scheduler.set_timesteps(steps, intermediate_timesteps=None)
        unit = schedule.sigma_data
    else:
        scheduler.set_timesteps(steps)
    latents = noise * unit * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps[: steps if schedule.path == "trigflow" else None]:
        shown = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        asked = t.to(torch.int64) if schedule.path == "cosine" else t
        prediction = unit * predict(shown, asked.expand(len(noise)))
        draws = "generator" in inspect.signature(scheduler.step).parameters
        latents = scheduler.step(prediction, t, latents, **({"generator": made} if draws else {})).prev_sample
    return latents


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize(("prediction", "name"), CASES)
def test_sample_is_the_loop_of_diffusers(prediction, name, seed):
    schedule = NoiseSchedule(prediction)
    scheduler = make_scheduler(schedule, name)
    torch.manual_seed(seed)
    noise, weight = torch.randn(SHAPE), torch.randn(3, 3)

    def predict(latents, timestep):
        wave = torch.sin(timestep.float() / schedule.timestep_range).view(-1, 1, 1, 1)
        return torch.einsum("cd, idhw -> ichw", weight, latents).tanh() + wave

    result = run(predict, noise, schedule, scheduler, seed)
    assert torch.equal(result, by_hand(predict, noise, schedule, scheduler, seed)), seed


V = {"prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2", **V}
OWN = [
    diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **COSINE),
    diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **COSINE),
    diffusers.HeunDiscreteScheduler(**COSINE),
    diffusers.UniPCMultistepScheduler(**COSINE),
    diffusers.FlowMatchHeunDiscreteScheduler(),
    diffusers.FlowMatchLCMScheduler(),
]


@pytest.mark.parametrize(
    ("prediction", "scheduler"),
    [
        *((prediction, make_scheduler(NoiseSchedule(prediction), name)) for prediction, name in CASES),
        *((dict(own.config).get("prediction_type", "flow_prediction"), own) for own in OWN),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_perfect_prediction_recovers_the_latents(prediction, scheduler, seed):
    """With ours, and with those of ones own that scale the initial noise and the network's input or step twice."""
    schedule = NoiseSchedule(prediction)
    torch.manual_seed(seed)
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    predict = perfect(schedule, clean)
    result = run(predict, noise, schedule, scheduler, seed, steps=10)
    # another noise is another order of rounding
    eager = [by_hand(predict, torch.randn(SHAPE), schedule, scheduler, seed + i, steps=10) for i in range(4)]
    verdict = judge(result, eager, clean.double())
    assert verdict.passed and verdict.bound < (noise - clean).abs().max() / 100, (seed, verdict)


@pytest.mark.parametrize(("prediction", "name"), CASES)
def test_the_network_gets_timesteps_of_the_schedules_kind(prediction, name, seed):
    schedule, seen = NoiseSchedule(prediction), []

    def predict(latents, timestep):
        seen.append(timestep)
        return latents

    run(predict, torch.randn(SHAPE), schedule, make_scheduler(schedule, name), seed)
    kind = schedule.timestep(torch.rand(2)).dtype
    assert [(t.shape, t.dtype) for t in seen] == [((2,), kind)] * 5
    moments = torch.stack(seen)
    assert (moments[:, 0] == moments[:, 1]).all() and (moments.diff(dim=0) < 0).all() and (moments >= 0).all()
    assert moments.max() <= schedule.timestep_range + 1e-5


def test_fractional_timesteps_reach_the_network_rounded(seed):
    schedule, seen = NoiseSchedule("v_prediction"), []
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True
    )
    run(lambda x, t: seen.append(t) or x, torch.randn(SHAPE), schedule, scheduler, seed, steps=9)
    scheduler.set_timesteps(9)
    assert (scheduler.timesteps % 1 > 0.5).any() and (scheduler.timesteps % 1 < 0.5).any()
    assert torch.equal(torch.stack(seen)[:, 0], scheduler.timesteps.round().long())


def test_a_last_timestep_below_zero_reaches_the_network_as_zero(seed):
    """diffusers rounds the trailing ones of 223 steps and some more so that one is -1, with the sigma of 0."""
    schedule, seen = NoiseSchedule("v_prediction"), []
    scheduler = make_scheduler(schedule, "dpmsolver")
    run(lambda x, t: seen.append(int(t[0])) or x, torch.randn(SHAPE), schedule, scheduler, seed, steps=223)
    assert timesteps(scheduler, schedule, 223)[-1] == -1 and seen[-1] == min(seen) == 0


@pytest.mark.parametrize(("prediction", "name"), CASES)
def test_each_image_has_draws_of_its_own(prediction, name, seed):
    schedule = NoiseSchedule(prediction)
    scheduler = make_scheduler(schedule, name)
    torch.manual_seed(seed)
    noise = torch.randn(SHAPE)
    both = run(lambda x, t: x.tanh(), noise, schedule, scheduler, seed)
    second = run(lambda x, t: x.tanh(), noise[1:], schedule, scheduler, seed + 1)
    assert torch.equal(both[1:], second), seed


def test_the_scheduler_stays_as_it_is(seed):
    schedule = NoiseSchedule("v_prediction")
    scheduler = make_scheduler(schedule, "dpmsolver")
    before = copy.deepcopy(vars(scheduler))
    first, second = (run(lambda x, t: x.tanh(), torch.ones(SHAPE), schedule, scheduler, seed) for _ in range(2))
    assert torch.equal(first, second)
    assert str(vars(scheduler)) == str(before)


def test_ddim_that_clips_adds_up(seed):
    """x_next = alpha·clipped + sigma·noise with that noise for which x = alpha·clipped + sigma·noise.

    With the noise of the unclipped estimate, strong guidance turned white backgrounds black.
    """
    schedule = NoiseSchedule("v_prediction")
    torch.manual_seed(seed)
    seen = []

    def predict(noisy, timestep):
        seen.append((noisy.double(), [c.double().view(-1, 1, 1, 1) for c in schedule.coefficients(timestep)]))
        return -3 * noisy.sign()  # an estimate far outside [-1, 1]

    run(predict, torch.randn(SHAPE), schedule, make_scheduler(schedule, "ddim", True), seed, steps=5)
    for (x, (alpha, sigma, *_)), (x_next, (alpha_next, sigma_next, *_)) in itertools.pairwise(seen):
        clipped = (alpha * x + sigma * 3 * x.sign()).clamp(-1, 1)
        noise = (x - alpha * clipped) / sigma
        torch.testing.assert_close(x_next, alpha_next * clipped + sigma_next * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_clip_sample_keeps_the_latents_within_one(name, seed):
    schedule = NoiseSchedule("v_prediction")
    torch.manual_seed(seed)
    noise, clean = torch.randn(SHAPE), 3 * torch.randn(SHAPE)
    far = clean.abs() > 1.01
    free, clipped = (
        run(perfect(schedule, clean), noise, schedule, make_scheduler(schedule, name, clip), seed, steps=10)
        for clip in (False, True)
    )
    assert torch.equal(clipped[far], clean[far].sign()), seed
    assert (free[far].abs() > 1).all() and far.any(), seed


def test_progress_shows_each_step(capsys, seed):
    schedule = NoiseSchedule()
    run(lambda x, t: x, torch.randn(SHAPE), schedule, make_scheduler(schedule), seed, progress=True)
    assert "5/5" in capsys.readouterr().err
    run(lambda x, t: x, torch.randn(SHAPE), schedule, make_scheduler(schedule), seed)
    assert capsys.readouterr().err == ""


def test_a_prediction_that_is_not_finite_names_its_step(seed):
    schedule, calls = NoiseSchedule("v_prediction"), []

    def predict(latents, timestep):
        calls.append(timestep)
        return torch.full_like(latents, torch.inf) if len(calls) == 3 else latents

    with pytest.raises(FloatingPointError, match=r"step 3 of 5 \(timestep 599\)"):
        run(predict, torch.randn(SHAPE), schedule, make_scheduler(schedule), seed)


def test_the_callback_gets_each_step_and_its_latents_are_gone_on_with(seed):
    schedule, seen = NoiseSchedule("v_prediction"), []

    def halve(step, timestep, latents):
        seen.append((step, int(timestep)))
        return latents / 2

    torch.manual_seed(seed)
    noise = torch.randn(SHAPE)
    result = run(lambda x, t: x.tanh(), noise, schedule, make_scheduler(schedule), seed, on_step_end=halve)
    assert seen == [(0, 999), (1, 799), (2, 599), (3, 399), (4, 199)]
    latents, scheduler = noise, make_scheduler(schedule)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        latents = scheduler.step(latents.tanh(), t, latents).prev_sample / 2
    assert torch.equal(result, latents), seed


# ---------------------------------------------------------------- which scheduler


def test_the_papers_scheduler_is_250_steps_of_ddpm():
    schedule = NoiseSchedule()
    assert (
        type(make_scheduler(schedule, "paper")) is diffusers.DDPMScheduler and default_steps(schedule, "paper") == 250
    )
    assert len(timesteps(make_scheduler(schedule, "paper"), schedule, default_steps(schedule, "paper"))) == 250


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "trigflow"])
def test_the_usual_steps_of_every_scheduler_fit_it(prediction):
    schedule = NoiseSchedule(prediction)
    for name, kind in SCHEDULERS.items():
        if kind.path == schedule.path:
            steps = default_steps(schedule, name)
            assert len(timesteps(make_scheduler(schedule, name), schedule, steps)) == steps
            assert can_clip(schedule, name) == (name in ("ddim", "ddpm"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "trigflow"])
def test_the_default_fits_every_prediction(prediction):
    schedule = NoiseSchedule(prediction, num_train_timesteps=100, sigma_data=0.3)
    scheduler = make_scheduler(schedule)
    check_scheduler(scheduler, schedule)
    assert len(timesteps(scheduler, schedule, 100 if prediction != "trigflow" else 7)) in (100, 7)


def test_v_prediction_starts_at_the_purest_noise():
    schedule = NoiseSchedule("v_prediction")
    for name in ("ddim", "ddpm"):
        assert timesteps(make_scheduler(schedule, name), schedule, 10)[0] == 999
    first = timesteps(make_scheduler(schedule, "dpmsolver"), schedule, 10)[:1]
    alpha, sigma, *_ = schedule.coefficients(first)
    assert 0 < first.item() < 999 and math.log(alpha / sigma) == pytest.approx(-5.1, abs=0.3)


@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_leading_timesteps_forgive_an_epsilon_that_errs(name, steps, seed):
    """Why `make_scheduler` does not start epsilon at T - 1: the error that trailing timesteps make of the same slip."""
    schedule = NoiseSchedule("epsilon")
    ours = make_scheduler(schedule, name)
    trailing = type(ours).from_config(ours.config, timestep_spacing="trailing")
    torch.manual_seed(seed)
    clean, noise, slip = torch.randn(SHAPE), torch.randn(SHAPE), 0.01 * torch.randn(SHAPE)

    def slips_at_first(latents, timestep):
        return perfect(schedule, clean)(latents, timestep) + slip * (timestep >= first).view(-1, 1, 1, 1)

    after_first_step = []
    for scheduler in (ours, trailing):
        moments = timesteps(copy.deepcopy(scheduler), schedule, steps)
        first = moments[0]
        walker = copy.deepcopy(scheduler)
        walker.set_timesteps(steps)
        exact, slipped = (
            walker.step(p(noise, first.expand(2)), first, noise, generator=generators(seed)).prev_sample
            for p in (perfect(schedule, clean), slips_at_first)
        )
        after_first_step.append((slipped - exact).abs().max())
    assert 10 * after_first_step[0] < after_first_step[1], (seed, after_first_step)


def test_flow_spends_every_step_evenly():
    schedule = NoiseSchedule("flow_prediction")
    scheduler = make_scheduler(schedule)
    moments = timesteps(scheduler, schedule, 8)
    assert torch.equal(moments, torch.arange(8, 0, -1) * 125.0)
    assert torch.equal(scheduler.sigmas, torch.arange(8, -1, -1) / 8)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_scm_takes_any_number_of_steps(steps):
    schedule = NoiseSchedule("trigflow")
    moments = timesteps(make_scheduler(schedule), schedule, steps)
    assert len(moments) == steps and (moments > 0).all() and moments[0] == pytest.approx(math.pi / 2, abs=1e-5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prediction", "name", "clip", "message"),
    [
        ("flow_prediction", "ddim", False, "'ddim' cannot sample 'flow_prediction'.*choose 'fast' or 'euler'"),
        (
            "v_prediction",
            "euler",
            False,
            "'euler' cannot sample 'v_prediction'.*choose 'fast' or 'ddim' or 'ddpm' or 'dpmsolver'",
        ),
        ("trigflow", "ddpm", False, "'ddpm' cannot sample 'trigflow'.*choose 'fast' or 'scm'"),
        ("epsilon", "plms", False, "'plms' is unknown; choose one of fast, paper, ddim, ddpm, dpmsolver, euler, scm"),
        ("epsilon", "dpmsolver", True, "'dpmsolver' cannot clip"),
        ("flow_prediction", "fast", True, "'euler' cannot clip"),
        ("flow_prediction", "paper", False, "'paper' cannot sample 'flow_prediction'"),
    ],
)
def test_make_scheduler_refuses(prediction, name, clip, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(NoiseSchedule(prediction), name, clip)


@pytest.mark.parametrize(
    ("prediction", "scheduler", "message"),
    [
        ("v_prediction", make_scheduler(NoiseSchedule("epsilon")), "prediction_type='epsilon'.*'v_prediction'"),
        ("epsilon", diffusers.DDIMScheduler(), "beta_schedule='linear'.*'squaredcos_cap_v2'"),
        ("epsilon", make_scheduler(NoiseSchedule("epsilon", 500)), "num_train_timesteps=500.*1000"),
        ("epsilon", make_scheduler(NoiseSchedule("flow_prediction")), "has no prediction_type"),
        ("flow_prediction", make_scheduler(NoiseSchedule("epsilon")), "prediction_type='epsilon'"),
        ("flow_prediction", make_scheduler(NoiseSchedule("trigflow")), "prediction_type='trigflow'"),
        ("trigflow", make_scheduler(NoiseSchedule("trigflow", sigma_data=0.9)), r"sigma_data=0\.9.*0\.5"),
        ("v_prediction", diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "has no beta_schedule"),
        ("v_prediction", diffusers.DDIMScheduler(trained_betas=[0.01] * 1000, **V), "alphas_cumprod that are not"),
        ("v_prediction", diffusers.CogVideoXDDIMScheduler(**COSINE), "alphas_cumprod that are not"),
        ("v_prediction", diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, **COSINE), "use_flow_sigmas=True"),
        ("flow_prediction", diffusers.IPNDMScheduler(), "has no prediction_type"),
        ("flow_prediction", diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "flow_sigmas=False"),
        ("v_prediction", diffusers.DDIMInverseScheduler(**COSINE), "timesteps 0, 200, 400, 600, ...; .* goes down"),
        ("v_prediction", diffusers.DPMSolverMultistepInverseScheduler(**COSINE), "sampling goes down from there"),
        ("flow_prediction", diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "goes down from there"),
        ("v_prediction", diffusers.DDIMScheduler(steps_offset=300, **COSINE), r"timesteps 1100, 900, .* 0\.\.999"),
    ],
)
def test_a_scheduler_of_another_path_is_refused(prediction, scheduler, message, seed):
    with pytest.raises(ValueError, match=message):
        run(lambda x, t: x, torch.randn(SHAPE), NoiseSchedule(prediction), scheduler, seed)


def test_what_differs_by_less_than_it_matters_is_taken(seed):
    """Betas of its own that are the cosine's, no signal at T - 1, the flow by a scheduler of more paths than one."""
    cosine, flow = NoiseSchedule("v_prediction"), NoiseSchedule("flow_prediction")
    betas = make_scheduler(cosine).betas.tolist()
    for scheduler in (
        diffusers.DDIMScheduler(trained_betas=betas, **V),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", **COSINE),
        diffusers.KDPM2AncestralDiscreteScheduler(timestep_spacing="trailing", **COSINE),
    ):
        check_scheduler(scheduler, cosine)
        assert len(timesteps(scheduler, cosine, 10)) >= 10
    of_many = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    torch.manual_seed(seed)
    clean = torch.randn(SHAPE)
    drawn = run(perfect(flow, clean), torch.randn(SHAPE), flow, of_many, seed, steps=10)
    torch.testing.assert_close(drawn, clean, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction", "trigflow"])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(prediction, steps):
    schedule = NoiseSchedule(prediction)
    with pytest.raises(ValueError, match=f"steps={steps} must be within 1..1000"):
        timesteps(make_scheduler(schedule), schedule, steps)


@pytest.mark.parametrize("steps", [2.5, "4", None])
def test_steps_that_are_no_whole_number_are_refused(steps):
    schedule = NoiseSchedule()
    with pytest.raises(TypeError, match=f"steps={steps!r} must be a whole number, got {type(steps).__name__}"):
        timesteps(make_scheduler(schedule), schedule, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "below", "above"), [(30, 25, 40), (999, 500, 1000), (3, 2, 4)])
def test_ddim_refuses_steps_that_would_skip_some_of_its_path(prediction, steps, below, above):
    schedule = NoiseSchedule(prediction)
    with pytest.raises(ValueError, match=f"steps={steps} does not divide.*steps={below} or steps={above}"):
        timesteps(make_scheduler(schedule, "ddim"), schedule, steps)
    assert len(timesteps(make_scheduler(schedule, "dpmsolver"), schedule, steps)) == pytest.approx(steps, abs=5)


@pytest.mark.parametrize("not_one", [None, "ddim", diffusers.DDIMScheduler, object()])
def test_what_is_no_scheduler_is_refused(not_one, seed):
    with pytest.raises(TypeError, match="is no scheduler: it must have diffusers' set_timesteps and step"):
        run(lambda x, t: x, torch.randn(SHAPE), NoiseSchedule(), not_one, seed)


def test_every_name_is_a_class_of_diffusers():
    assert all(hasattr(diffusers, kind.class_name) for kind in SCHEDULERS.values())
