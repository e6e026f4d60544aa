"""NoiseSchedule against diffusers' schedulers, and the identities that each prediction rests on."""

import dataclasses
import math
import random

import pytest
import torch
from cosine import alphas_cumprod_gold
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from transfusion.diffusion.schedule import Coefficients, NoiseSchedule, cosine_path
from transfusion.kernels.testing import judge

EPS = torch.finfo(torch.float32).eps
PREDICTIONS = ["epsilon", "v_prediction", "flow_prediction", "trigflow"]


def make_images(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Data and noise (count, 2, 4, 4)."""
    seed = random.randrange(2**32)
    print(f"input seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    data, noise = (torch.randn(count, 2, 4, 4, generator=generator).to(dtype) for _ in range(2))
    return data, noise


def mix(data_weight: Tensor, data: Tensor, noise_weight: Tensor, noise: Tensor) -> Tensor:
    return data_weight.view(-1, 1, 1, 1) * data + noise_weight.view(-1, 1, 1, 1) * noise


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 10, 1000, 4000])
def test_cosine_path_is_at_least_as_exact_as_diffusers(num_train_timesteps: int) -> None:
    """Relative to the float64 definition, at every timestep; and diffusers is that definition, to its rounding."""
    betas, gold = alphas_cumprod_gold(num_train_timesteps)
    scheduler = DDPMScheduler(num_train_timesteps, beta_schedule="squaredcos_cap_v2")
    theirs = scheduler.alphas_cumprod
    # Rounding beta, then 1 - beta, then the product: half an ulp of each, the first divided by 1 - beta.
    rounding = (EPS / 2 * (betas / (1 - betas) + 2)).cumsum(0)
    assert ((theirs - gold).abs() <= gold * rounding.expm1()).all()
    alpha, sigma = cosine_path(torch.arange(num_train_timesteps), num_train_timesteps)
    assert alpha.dtype == sigma.dtype == torch.float32
    one = torch.ones_like(gold)
    for ours, eager, exact in ((alpha, theirs.sqrt(), gold.sqrt()), (sigma, (1 - theirs).sqrt(), (1 - gold).sqrt())):
        verdict = judge((ours / exact).to(torch.float32), eager / exact, one)
        assert verdict.passed, verdict


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_cosine_matches_ddpm_scheduler(prediction: str, num_train_timesteps: int) -> None:
    """add_noise and get_velocity at every timestep, judged by diffusers' own float32 error."""
    schedule = NoiseSchedule(prediction, num_train_timesteps)
    scheduler = DDPMScheduler(num_train_timesteps, beta_schedule="squaredcos_cap_v2")
    timestep = torch.arange(num_train_timesteps).repeat(1000 // num_train_timesteps)  # of ten images an error is luck
    data, noise = make_images(len(timestep))
    alpha, sigma, data_weight, noise_weight = schedule.coefficients(timestep)
    noisy, target = mix(alpha, data, sigma, noise), mix(data_weight, data, noise_weight, noise)

    def theirs(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        noisy = scheduler.add_noise(data, noise, timestep)
        return noisy, noise if prediction == "epsilon" else scheduler.get_velocity(data, noise, timestep)

    eager = theirs(data, noise)
    scheduler.alphas_cumprod = alphas_cumprod_gold(num_train_timesteps)[1]
    gold = theirs(data.double(), noise.double())
    assert gold[0].dtype == torch.float64
    for ours, of_diffusers, exact in zip((noisy, target), eager, gold, strict=True):
        verdict = judge(ours, of_diffusers, exact, factor=1.0)
        assert verdict.passed, verdict


def test_flow_matches_flow_match_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule = NoiseSchedule("flow_prediction")
    timestep = scheduler.timesteps
    data, noise = make_images(len(timestep))
    alpha, sigma, data_weight, noise_weight = schedule.coefficients(timestep)
    noisy = mix(alpha, data, sigma, noise)
    theirs = scheduler.scale_noise(data, timestep, noise)
    exact_sigma = (timestep.double() / 1000).view(-1, 1, 1, 1)
    gold = exact_sigma * noise.double() + (1 - exact_sigma) * data.double()
    verdict = judge(noisy, theirs, gold, factor=1.0)
    assert verdict.passed, verdict
    assert torch.equal(mix(data_weight, data, noise_weight, noise), noise - data)


def test_flow_target_leads_their_euler_step_to_the_data() -> None:
    """One step of FlowMatchEulerDiscreteScheduler from any sigma to 0 along the target ends at the data."""
    schedule = NoiseSchedule("flow_prediction")
    data, noise = make_images(1)
    for time in (0.25, 0.5, 0.75):  # exact in float32, as are the sigmas then
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[time])
        timestep = schedule.timestep(torch.tensor([time]))
        assert torch.equal(timestep, scheduler.timesteps)
        alpha, sigma, data_weight, noise_weight = schedule.coefficients(timestep)
        noisy, target = mix(alpha, data, sigma, noise), mix(data_weight, data, noise_weight, noise)
        result = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
        # Five roundings of numbers no larger than |data| + |noise|.
        assert ((result - data).abs() <= 5 * EPS * (data.abs() + noise.abs())).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_cosine_target_leads_their_step_to_the_data(prediction: str) -> None:
    """DDIM and DDPM of the same prediction_type recover the data from the target."""
    schedule = NoiseSchedule(prediction)
    data, noise = make_images(1)
    options = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "prediction_type": prediction}
    for scheduler in (DDPMScheduler(**options), DDIMScheduler(**options)):
        scheduler.set_timesteps(1000)
        for t in (1, 250, 500, 750, 990):
            timestep = torch.tensor([t])
            alpha, sigma, data_weight, noise_weight = schedule.coefficients(timestep)
            noisy, target = mix(alpha, data, sigma, noise), mix(data_weight, data, noise_weight, noise)
            # In float64, so that only the difference of the coefficients remains.
            step = scheduler.step(target.double(), t, noisy.double())
            difference = (scheduler.alphas_cumprod[t] - alphas_cumprod_gold(1000)[1][t]).abs() + 4 * EPS
            scale = difference / (alpha.double() * sigma.double()).square()
            assert ((step.pred_original_sample - data).abs() <= scale * (data.abs() + noise.abs())).all(), t


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 1.7])
def test_trigflow_identities(sigma_data: float) -> None:
    """x_t = cos t·x + sin t·z with z = sigma_data·noise; sigma_data·F = cos t·z - sin t·x, and f recovers x."""
    schedule = NoiseSchedule("trigflow", sigma_data=sigma_data)
    t = schedule.timestep(torch.arange(64) / 64)
    assert t.dtype == torch.float32 and (t >= 0).all() and (t < math.pi / 2).all()
    data, noise = make_images(64)
    alpha, sigma, data_weight, noise_weight = schedule.coefficients(t)
    cos, sin = (f(t.double()).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    x, z = data.double(), sigma_data * noise.double()
    bound = 4 * EPS * (1 + sigma_data) * (1 + 1 / sigma_data) * (x.abs() + noise.abs())
    noisy = mix(alpha.double(), x, sigma.double(), noise.double())
    target = mix(data_weight.double(), x, noise_weight.double(), noise.double())
    assert ((noisy - (cos * x + sin * z)).abs() <= bound).all()
    assert ((sigma_data * target - (cos * z - sin * x)).abs() <= bound).all()
    assert ((cos * noisy - sin * sigma_data * target - x).abs() <= bound).all()


def test_trigflow_target_leads_their_step_to_the_data() -> None:
    """SCMScheduler, whose model output is sigma_data·F, recovers the data."""
    schedule = NoiseSchedule("trigflow")
    data, noise = make_images(1)
    scheduler = SCMScheduler(sigma_data=schedule.sigma_data)
    scheduler.set_timesteps(num_inference_steps=1, max_timesteps=1.1, intermediate_timesteps=None)
    timestep = scheduler.timesteps[:1]
    alpha, sigma, data_weight, noise_weight = schedule.coefficients(timestep)
    noisy, target = mix(alpha, data, sigma, noise), mix(data_weight, data, noise_weight, noise)
    result = scheduler.step(schedule.sigma_data * target, timestep[0], noisy).pred_original_sample
    assert ((result - data).abs() <= 8 * EPS * (data.abs() + noise.abs())).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_from_data_to_noise(prediction: str) -> None:
    """At the start nearly the data, at the end nearly the noise; alpha falls and sigma rises in between."""
    schedule = NoiseSchedule(prediction, sigma_data=1.0)
    time = (torch.arange(1000) + 0.5) / 1000
    alpha, sigma, *_ = schedule.coefficients(schedule.timestep(time))
    assert alpha[0] > 0.999 and sigma[0] < 0.01
    assert alpha[-1] < 0.01 and sigma[-1] > 0.99
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all()
    if prediction != "flow_prediction":
        # sqrt and sin are exact to an ulp or two; their squares add up to one.
        assert ((alpha.double() ** 2 + sigma.double() ** 2 - 1).abs() <= 8 * EPS).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weight(prediction: str, gamma: float) -> None:
    """Against the definition in float64: min(SNR, gamma) times what a unit error of the prediction does to the estimate
    of the clean latent, taken from two predictions; and the paper's forms for epsilon and v."""
    schedule = NoiseSchedule(prediction, sigma_data=0.7)
    timestep = schedule.timestep(torch.arange(1, 200) / 200)
    weight = schedule.min_snr_weight(timestep, gamma)
    assert weight.dtype == torch.float32 and weight.shape == (199,)
    alpha, sigma, data_weight, noise_weight = (c.double() for c in schedule.coefficients(timestep))
    deviation = 0.7 if prediction == "trigflow" else 1.0
    snr = (deviation * alpha / sigma).square()

    def estimate(target: float) -> Tensor:
        """x of noisy = alpha·x + sigma·z = 0 and data_weight·x + noise_weight·z = target."""
        return -sigma * target / (alpha * noise_weight - sigma * data_weight)

    expected = snr.clamp(max=gamma) * ((estimate(1.0) - estimate(0.0)) / deviation).square()
    eps = torch.finfo(torch.float32).eps
    assert ((weight - expected).abs() <= 16 * eps * expected).all()
    if prediction == "epsilon":
        assert ((weight - (gamma / snr).clamp(max=1)).abs() <= 16 * eps).all()
    if prediction == "v_prediction":
        assert ((weight - snr.clamp(max=gamma) / (snr + 1)).abs() <= 32 * eps * weight).all()


def test_min_snr_weight_is_finite_at_the_ends_and_refuses_gamma() -> None:
    for prediction in PREDICTIONS:
        schedule = NoiseSchedule(prediction)
        weight = schedule.min_snr_weight(schedule.timestep(torch.tensor([0.0, 1 - 2**-24])))
        assert weight.isfinite().all() and (weight >= 0).all(), prediction
    with pytest.raises(ValueError, match=r"gamma=0\.0"):
        NoiseSchedule().min_snr_weight(torch.tensor([3]), gamma=0.0)


def test_timestep_units() -> None:
    time = torch.tensor([0.0, 0.25, 0.5, 0.9999, 1 - 2**-24])
    cosine = NoiseSchedule("v_prediction").timestep(time)
    assert cosine.dtype == torch.int64 and cosine.tolist() == [0, 250, 500, 999, 999]
    assert NoiseSchedule("epsilon", num_train_timesteps=3).timestep(time).tolist() == [0, 0, 1, 2, 2]
    assert torch.equal(NoiseSchedule("flow_prediction").timestep(time), time * 1000)
    assert torch.equal(NoiseSchedule("flow_prediction", num_train_timesteps=4).timestep(time), time * 4)
    assert torch.equal(NoiseSchedule("trigflow").timestep(time), time * (math.pi / 2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_coefficients_are_float32_per_image(prediction: str) -> None:
    schedule = NoiseSchedule(prediction)
    timestep = schedule.timestep(torch.rand(7))
    before = timestep.clone()
    coefficients = schedule.coefficients(timestep)
    assert isinstance(coefficients, Coefficients)
    assert all(c.shape == (7,) and c.dtype == torch.float32 and c.device == timestep.device for c in coefficients)
    assert torch.equal(timestep, before)
    assert all(c.shape == (0,) for c in schedule.coefficients(schedule.timestep(torch.rand(0))))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_works_on_meta_and_compiles(prediction: str) -> None:
    """Meta tensors have no values: whatever reads one on the host fails there."""
    schedule = NoiseSchedule(prediction)

    def noising(time: Tensor) -> Coefficients:
        return schedule.coefficients(schedule.timestep(time))

    assert all(c.device.type == "meta" for c in noising(torch.empty(5, device="meta")))
    time = torch.rand(5)
    compiled = torch.compile(noising, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(time), noising(time), strict=True))


def test_is_plain_fields() -> None:
    schedule = NoiseSchedule("trigflow", sigma_data=0.7)
    fields = dataclasses.asdict(schedule)
    assert fields == {"prediction": "trigflow", "num_train_timesteps": 1000, "sigma_data": 0.7}
    assert NoiseSchedule(**fields) == schedule
    assert NoiseSchedule().prediction == "epsilon" and NoiseSchedule().num_train_timesteps == 1000  # the paper's


def test_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="prediction='sample' is not one of epsilon, v_prediction"):
        NoiseSchedule("sample")
    with pytest.raises(ValueError, match="num_train_timesteps=0"):
        NoiseSchedule(num_train_timesteps=0)
    for steps in (1000.5, math.nan, "1000"):
        with pytest.raises(TypeError, match=f"num_train_timesteps={steps!r} must be a whole number"):
            NoiseSchedule(num_train_timesteps=steps)
    for sigma_data in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma_data="):
            NoiseSchedule("trigflow", sigma_data=sigma_data)
    with pytest.raises(TypeError, match=r"time .*torch\.int64"):
        NoiseSchedule().timestep(torch.tensor([3]))
    with pytest.raises(TypeError, match=r"'epsilon' must be int64, got torch\.float32"):
        NoiseSchedule().coefficients(torch.tensor([3.0]))
    with pytest.raises(TypeError, match=r"'flow_prediction' must be floating point, got torch\.int64"):
        NoiseSchedule("flow_prediction").coefficients(torch.tensor([3]))
