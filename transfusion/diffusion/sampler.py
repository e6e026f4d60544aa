"""noise -> latents: a diffusers scheduler steps along the path that the network was trained on.

    timesteps(scheduler) = t_1 > t_2 > ... ;   x <- scheduler.step(prediction(x, t), t, x)

`make_scheduler` makes the scheduler that belongs to a `NoiseSchedule`; `sample` runs it, or any other one with
diffusers' interface that steps along the same path. The network is a function here: nothing in this file knows of
transformers or text.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.diffusion.schedule import NoiseSchedule, Path, cosine_path
from transfusion.kernels.registry import whole
from transfusion.optional import require

Predict = Callable[[Tensor, Tensor], Tensor]
OnStepEnd = Callable[[int, Tensor, Tensor], Tensor]


class _Kind(NamedTuple):
    """A diffusers class, the path that it steps along, its usual number of steps, and whether it can clip its estimate
    of the clean latent."""

    class_name: str
    path: Path
    steps: int
    clips: bool = False


SCHEDULERS: dict[str, _Kind] = {
    "ddim": _Kind("DDIMScheduler", "cosine", 50, clips=True),
    "ddpm": _Kind("DDPMScheduler", "cosine", 250, clips=True),
    "dpmsolver": _Kind("DPMSolverMultistepScheduler", "cosine", 20),
    "euler": _Kind("FlowMatchEulerDiscreteScheduler", "flow", 50),
    "scm": _Kind("SCMScheduler", "trigflow", 2),
}


class Known(NamedTuple):
    """What of the images is given: `latents` (I, C, h, w) clean, `unknown` (I, 1, h, w) bool, True where to paint."""

    latents: Tensor
    unknown: Tensor


def scheduler_name(schedule: NoiseSchedule, name: str = "fast") -> str:
    """-> the name in `SCHEDULERS` that `name` stands for: "paper" for "ddpm", whose 250 of 1000 steps are the paper's
    (arXiv 2408.11039, section 4.1); "fast" for the first that steps along the path of `schedule`.

    Raises `ValueError` for an unknown name, or one of another path.
    """
    fitting = [each for each, kind in SCHEDULERS.items() if kind.path == schedule.path]
    found = {"paper": "ddpm", "fast": fitting[0]}.get(name, name)
    if found not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown; choose one of fast, paper, {', '.join(SCHEDULERS)}")
    if found not in fitting:
        raise ValueError(
            f"scheduler {name!r} cannot sample {schedule.prediction!r}, whose path is {schedule.path}; "
            f"choose 'fast' or {' or '.join(repr(each) for each in fitting)}"
        )
    return found


def default_steps(schedule: NoiseSchedule, scheduler: Any = "fast", about: int | None = None) -> int:
    """A number of steps that the scheduler takes, nearest to `about`, by default to its usual number.

    scheduler: a name as `scheduler_name` takes it, or a scheduler, whose class tells its usual number. Raises as
    `scheduler_name` does.
    """
    if isinstance(scheduler, str):
        kind = SCHEDULERS[scheduler_name(schedule, scheduler)]
    else:
        fast = SCHEDULERS[scheduler_name(schedule)]
        kind = next((each for each in SCHEDULERS.values() if each.class_name == type(scheduler).__name__), fast)
    wanted, total = about or kind.steps, schedule.num_train_timesteps
    if kind.path == "trigflow":
        return wanted
    if not kind.clips:
        return min(wanted, total)
    divisors = (each for each in range(1, total + 1) if total % each == 0)  # it goes by total // steps
    return min(divisors, key=lambda steps: abs(math.log(steps / wanted)))


def can_clip(schedule: NoiseSchedule, name: str = "fast") -> bool:
    """Whether the scheduler that `name` stands for can clip its estimate. Raises as `scheduler_name` does."""
    return SCHEDULERS[scheduler_name(schedule, name)].clips


def make_scheduler(schedule: NoiseSchedule, name: str = "fast", clip_sample: bool = False) -> Any:
    """-> the diffusers scheduler `name` with the path, prediction and units of `schedule`.

    Args:
        schedule: what the network was trained on.
        name: "ddim", "ddpm" or "dpmsolver" (DPM-Solver++, second order) for epsilon and v_prediction, "euler" for
            flow_prediction, "scm" for trigflow; "paper" or "fast" as `scheduler_name` says. "scm" renoises its estimate
            at every step, which is right for consistency models alone (arXiv 2410.11081).
        clip_sample: hold the estimate of the clean latent within [-1, 1]: for pixels, not for an autoencoder's
            latents. "ddim" and "ddpm" only.

    "trailing" timesteps start at T - 1, where the training has its purest noise (arXiv 2305.08891). Under epsilon,
    ddim and ddpm take "leading" ones, which start T / steps lower: x = (x_t - sigma·epsilon) / alpha, and alpha is
    5e-5 at T - 1, so that the first step would blow up the network's error by alpha_next / alpha, some hundreds.
    DPM-Solver cuts that end off by its log signal-to-noise ratio instead, as diffusers advises for the cosine path.

    Raises `ValueError` for an unknown name, one of another path, or one that cannot clip.
    """
    name = scheduler_name(schedule, name)
    kind = SCHEDULERS[name]
    if clip_sample and not kind.clips:
        raise ValueError(f"scheduler {name!r} cannot clip; give clip_sample=False, or take 'ddim' or 'ddpm'")
    options: dict[str, Any] = {"num_train_timesteps": schedule.num_train_timesteps}
    if kind.path == "cosine":
        options |= {"beta_schedule": "squaredcos_cap_v2", "prediction_type": schedule.prediction}
        leads = kind.clips and schedule.prediction == "epsilon"
        options["timestep_spacing"] = "leading" if leads else "trailing"
        options |= {"clip_sample": clip_sample} if kind.clips else {"lambda_min_clipped": -5.1}
    if kind.path == "trigflow":
        options["sigma_data"] = schedule.sigma_data
    with torch.device("cpu"):  # whatever torch's default is
        return getattr(require("diffusers"), kind.class_name)(**options)


def check_scheduler(scheduler: Any, schedule: NoiseSchedule) -> None:
    """Raises `ValueError` where the scheduler's config or alphas say that it steps along another path than that of
    `schedule`, or where `step` must be told more than `sample` knows to tell, and `TypeError` where it is none. One
    without a config is judged by its timesteps alone."""
    if isinstance(scheduler, type) or not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise TypeError(
            f"{scheduler!r} is no scheduler: it must have diffusers' set_timesteps and step; "
            "take make_scheduler(model.config.schedule), or a scheduler object of diffusers"
        )
    if "prev_timestep" in inspect.signature(scheduler.step).parameters:
        raise ValueError(
            f"{type(scheduler).__name__} must be told the next timestep at each step, or it takes the one below; "
            "take make_scheduler(model.config.schedule)"
        )
    config = getattr(scheduler, "config", {})
    for key, value in _wanted(config, schedule).items():
        if config.get(key) != value:
            found = f"has {key}={config[key]!r}" if key in config else f"has no {key}"
            raise ValueError(
                f"{type(scheduler).__name__} {found}, but the model was trained with {key}={value!r}; "
                "take make_scheduler(model.config.schedule)"
            )
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if schedule.path == "cosine" and isinstance(alphas, Tensor):
        total = schedule.num_train_timesteps
        signal, _ = cosine_path(torch.arange(total, device="cpu"), total, torch.float64)
        # rescale_betas_zero_snr moves the cosine's by 5e-5
        if alphas.shape != signal.shape or (alphas.double().cpu() - signal**2).abs().max() > 1e-3:
            raise ValueError(
                f"{type(scheduler).__name__} has alphas_cumprod that are not those of squaredcos_cap_v2, with which "
                "the model was trained; leave trained_betas out, or take make_scheduler(model.config.schedule)"
            )


def _wanted(config: Any, schedule: NoiseSchedule) -> dict[str, Any]:
    """What a scheduler's config must say for it to step along the path of `schedule`."""
    if not config:
        return {}
    if schedule.path == "trigflow":
        return {"prediction_type": schedule.prediction, "sigma_data": schedule.sigma_data}
    wanted: dict[str, Any] = {"num_train_timesteps": schedule.num_train_timesteps}
    # FlowMatch* schedulers predict one thing, name no prediction type and shift their times; all others of diffusers
    # name what they predict, and step along the flow if use_flow_sigmas says so.
    if schedule.path == "cosine" or "shift" not in config:
        wanted["prediction_type"] = schedule.prediction
        if schedule.path == "flow" or "use_flow_sigmas" in config:
            wanted["use_flow_sigmas"] = schedule.path == "flow"
    if schedule.path == "cosine" and config.get("trained_betas") is None:
        wanted["beta_schedule"] = "squaredcos_cap_v2"
    return wanted


def timesteps(scheduler: Any, schedule: NoiseSchedule, steps: int) -> Tensor:
    """Sets the scheduler to `steps` steps -> the timesteps at which it asks the network: so many, more where it asks
    twice in a step, a few less where it cuts an end of the path off.

    Raises `ValueError` where steps is not in 1 .. T, or does not divide T for a scheduler that goes by T // steps, and
    where the timesteps do not go down within those that the network was trained at; `TypeError` for no whole number.
    """
    steps = whole("steps", steps)
    config = getattr(scheduler, "config", {})
    total = config.get("num_train_timesteps", schedule.num_train_timesteps)
    if not 1 <= steps <= total:
        raise ValueError(f"steps={steps} must be within 1..{total}, the scheduler's num_train_timesteps")
    # DDIM, DDPM and PNDM find the next timestep as t - T // steps; the others walk along their own list.
    if "timestep_spacing" in config and not hasattr(scheduler, "step_index") and total % steps:
        divisors = [each for each in range(1, total + 1) if total % each == 0]
        below, above = max(d for d in divisors if d < steps), min(d for d in divisors if d > steps)
        raise ValueError(
            f"steps={steps} does not divide the {total} training timesteps, and {type(scheduler).__name__} would skip "
            f"some of its path; take steps={below} or steps={above}, or another scheduler"
        )
    with torch.device("cpu"):
        _set_timesteps(scheduler, schedule, steps)
    if hasattr(scheduler, "set_begin_index"):  # or it looks for its first timestep, and of equal ones takes the second
        scheduler.set_begin_index(0)
    # TrigFlow's list ends with t = 0, where there is nothing left to ask
    moments: Tensor = scheduler.timesteps[:-1] if schedule.path == "trigflow" else scheduler.timesteps
    _check_timesteps(scheduler, schedule, moments.cpu())
    return moments


def _set_timesteps(scheduler: Any, schedule: NoiseSchedule, steps: int) -> None:
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if schedule.path == "trigflow":
        only_two = {} if steps == 2 else {"intermediate_timesteps": None}
        scheduler.set_timesteps(steps, **only_two)
    elif schedule.path == "flow" and takes_sigmas and "prediction_type" not in getattr(scheduler, "config", {}):
        # FlowMatch*, left alone, spends the last of its steps between sigma = 1 / T and 0, where nothing happens.
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def _check_timesteps(scheduler: Any, schedule: NoiseSchedule, moments: Tensor) -> None:
    """Raises `ValueError` unless the timesteps, as the network gets them, descend within the training's; a scheduler of
    two stages asks twice at one of them."""
    # diffusers' trailing timesteps may end at -1, which has the noise of 0; its trigflow starts at 1.57080, above π/2
    least, most = (-1, schedule.num_train_timesteps - 1) if schedule.path == "cosine" else (0, schedule.timestep_range)
    within = ((moments >= least) & (moments <= most + 1e-5)).all()
    if not within or (_model_timestep(moments, schedule).diff() > 0).any():
        shown = ", ".join(f"{moment:g}" for moment in moments[:4].tolist()) + (", ..." if len(moments) > 4 else "")
        raise ValueError(
            f"{type(scheduler).__name__} takes the timesteps {shown}; the model was trained at 0..{most:g}, and "
            "sampling goes down from there: take another scheduler, or another timestep_spacing or steps_offset of it"
        )


@torch.no_grad()
def sample(
    predict: Predict,
    noise: Tensor,
    *,
    schedule: NoiseSchedule,
    scheduler: Any,
    steps: int,
    generators: Sequence[torch.Generator],
    known: Known | None = None,
    on_step_end: OnStepEnd | None = None,
    progress: bool = False,
) -> Tensor:
    """noise -> latents, both (I, C, h, w) float32.

    Args:
        predict: (latents (I, C, h, w), timestep (I,) of the kind of `schedule.timestep`) -> the network's prediction,
            (I, C, h, w).
        noise: standard normal.
        schedule: what the network was trained on.
        scheduler: of diffusers, or with its interface. A copy of it is used, so it stays as it is.
        steps: how many the scheduler is set to.
        generators: one for each image, for schedulers that draw noise of their own; on the CPU, and the noise is the
            same on every device.
        known: a part of the images that stays as it is; the rest is painted to fit it. At every step the known part is
            put back, noised as far as the rest is then (RePaint, arXiv 2201.09865, without its resampling).
        on_step_end: (step from 0, timestep, latents) -> the latents to continue with, called after every step; what it
            gives is taken without its gradient, in float32.
        progress: show a bar.

    Raises:
        ValueError: a scheduler of another path, a number of steps that does not fit, what on_step_end gives.
        TypeError: what is no scheduler.
        FloatingPointError: a prediction that is not finite, naming the step.
    """
    check_scheduler(scheduler, schedule)
    if known is not None:
        _check_can_noise(scheduler)
    scheduler = copy.deepcopy(scheduler)
    moments = timesteps(scheduler, schedule, steps)
    # diffusers gives TrigFlow's prediction the unit of the latents; Lu & Song's network has unit variance.
    unit = schedule.sigma_data if schedule.path == "trigflow" else 1.0
    scale_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    options = _step_options(scheduler, generators)
    times = _model_timestep(moments, schedule).to(noise.device)  # at once: each by itself would wait for the device
    health = _Health(type(scheduler).__name__, moments)
    latents = noise.float() * (unit * getattr(scheduler, "init_noise_sigma", 1.0))
    for step, moment in enumerate(_bar(moments, progress)):
        if known is not None:
            latents = torch.where(known.unknown, latents, _noised(known.latents, noise, moment, scheduler, schedule))
        prediction = predict(scale_input(latents, moment), times[step].expand(len(latents))).float()
        health.see(step, latents, prediction)
        latents = scheduler.step(unit * prediction, moment, latents, **options, return_dict=False)[0]
        latents = latents if on_step_end is None else _gone_on_with(on_step_end(step, moment, latents), latents)
    health.check()
    if not latents.isfinite().all():
        made = "on_step_end" if on_step_end else type(scheduler).__name__
        raise FloatingPointError(f"the latents after the last of {len(moments)} denoising steps are not finite: {made}")
    return latents if known is None else torch.where(known.unknown, latents, known.latents.float())


def _gone_on_with(given: Any, latents: Tensor) -> Tensor:
    """What `on_step_end` gave. Raises `ValueError` where it is not like the latents."""
    if not isinstance(given, Tensor) or given.shape != latents.shape or not given.dtype.is_floating_point:
        found = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"on_step_end gave latents {found}; they must be {tuple(latents.shape)} floating point")
    return given.detach().to(latents.device, torch.float32)


def _check_can_noise(scheduler: Any) -> None:
    """Raises `ValueError` for the schedulers whose `add_noise` adds other noise than their latents have."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if name.startswith("KDPM2") or (name == "SASolverScheduler" and config.get("use_flow_sigmas")):
        raise ValueError(f"{name} cannot inpaint: its add_noise is not that of its path; take another scheduler")


def _noised(latents: Tensor, noise: Tensor, moment: Tensor, scheduler: Any, schedule: NoiseSchedule) -> Tensor:
    """The clean latents with the noise that the scheduler has at timestep `moment`, in the scheduler's own scale."""
    times = moment.to(latents.device).expand(len(latents))
    if hasattr(scheduler, "add_noise"):
        noised: Tensor = scheduler.add_noise(latents.float(), noise, times)
    elif hasattr(scheduler, "scale_noise"):
        noised = scheduler.scale_noise(latents.float(), times, noise)
    else:
        clock = _model_timestep(moment, schedule).to(noise.device)
        alpha, sigma, *_ = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(clock.expand(len(noise))))
        noised = alpha * latents.float() + sigma * noise
    return noised


def _step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """What `scheduler.step` takes beside the prediction.

    DDIM, left alone, clips its estimate of the latent but keeps the noise of the unclipped one; the two no longer add
    up to x, and the error grows with guidance until colours invert. So where it clips, noise and estimate agree.
    """
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": list(generators)} if "generator" in known else {}
    if "use_clipped_model_output" in known and getattr(scheduler, "config", {}).get("clip_sample"):
        options["use_clipped_model_output"] = True
    return options


def _model_timestep(moment: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The scheduler's timestep as the network knows it: on the cosine path it has only seen whole ones from 0 on."""
    if schedule.path != "cosine":
        return moment.to(torch.float32)
    return (moment.round() if moment.is_floating_point() else moment).to(torch.int64).clamp(min=0)


class _Health:
    """Whether predictions are finite: looked at once on a CPU; a GPU's at the end, for the host waits for none."""

    def __init__(self, name: str, moments: Tensor) -> None:
        self._name, self._moments = name, moments
        self._flags: list[Tensor] = []

    def see(self, step: int, latents: Tensor, prediction: Tensor) -> None:
        """What goes into a step, and what the network says of it."""
        flags = torch.stack([prediction.isfinite().all(), latents.isfinite().all()])
        if flags.device.type == "cpu":
            self._judge(step, *flags.tolist())
        else:
            self._flags.append(flags)

    def check(self) -> None:
        """Raises `FloatingPointError` naming the first step whose prediction was not finite."""
        for step, flags in enumerate(torch.stack(self._flags).tolist() if self._flags else ()):
            self._judge(step, *flags)

    def _judge(self, step: int, prediction: bool, latents: bool) -> None:
        if prediction:
            return
        where = f"denoising step {step + 1} of {len(self._moments)} (timestep {self._moments[step].item():g})"
        raise FloatingPointError(
            f"the prediction of {where} is not finite; look for NaN in the weights, or for guidance or a precision "
            "that overflows"
            if latents
            else f"the latents that {self._name} hands to {where} are not finite; take more steps, another scheduler, "
            "or look at what on_step_end makes of them"
        )


def _bar(moments: Tensor, progress: bool) -> Any:
    return require("tqdm").tqdm(moments, desc="denoising", unit="step") if progress else moments
