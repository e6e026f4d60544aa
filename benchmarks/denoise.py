"""Suite "denoise": one denoising step of a batch of images after their captions, with guidance, keys and values cached.

A step is the time between two calls back of the sampler, the device waited for. The first images are checked before.
"""

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.cases import DEVICE
from benchmarks.clock import QUICK, Effort, peak_memory, quantiles
from benchmarks.gate import failures
from benchmarks.models import random_model
from transfusion import Transfusion, presets
from transfusion.kernels.testing import Verdict, judge
from transfusion.sequence import Document, SpecialTokens, Text

SUITE = "denoise"
BASELINES = {"ours": "auto", "eager": "reference"}


@dataclass(frozen=True)
class DenoiseCase:
    """`images` images of side × side latents drawn at once by a preset."""

    preset: str
    images: int
    side: int


CASES = {
    "cpu": {"tiny_8_images": DenoiseCase("tiny", 8, 32)},
    "cuda": {"0.16b_32_images": DenoiseCase("0.16b", 32, 32), "1.4b_8_images": DenoiseCase("1.4b", 8, 32)},
}[DEVICE]


def pairs() -> list[tuple[str, str]]:
    """(case, baseline) of the suite."""
    return [(case, baseline) for case in CASES for baseline in BASELINES]


def why_not() -> str | None:
    """Why nothing can be sampled here."""
    return None if importlib.util.find_spec("diffusers") else "diffusers is not installed (pip install diffusers)"


def run(case_name: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    """The step's time, after the images passed the check."""
    if reason := why_not():
        yield rows.row(SUITE, case_name, baseline, "step", "skipped", reason=reason)
        return
    yield from rows.explained(_rows(case_name, baseline, effort), (SUITE, case_name, baseline), ("step",), ours=True)


def _rows(case_name: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    case = CASES[case_name]
    model = random_model(presets.get(case.preset)).eval()
    checked = check(model, case, BASELINES[baseline])
    if wrong := failures(checked):
        yield rows.row(SUITE, case_name, baseline, "step", "failed", reason=wrong, gate=checked)
        return
    model = model.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with peak_memory() as peak:
        step_times(model, case, BASELINES[baseline], 2)
    times = quantiles(step_times(model, case, BASELINES[baseline], 5 if effort == QUICK else 20))
    figures = {"images_per_second_and_step": case.images / times.p50, "peak_bytes": (peak or [None])[0]}
    yield rows.row(SUITE, case_name, baseline, "step", "ok", gate=checked, **times._asdict(), **figures)


def check(model: Transfusion, case: DenoiseCase, impl: str) -> dict[str, Verdict]:
    """Two steps in float32 against the same in float64, on two images."""
    actual, eager = (sample(model, case, each, 2, 2) for each in (impl, "reference"))
    gold = sample(model.double(), case, "reference", 2, 2)
    model.float()
    return {"latents": judge(actual, eager, gold)}


def sample(
    model: Transfusion, case: DenoiseCase, impl: str, steps: int, images: int, on_step_end: Any = None
) -> Tensor:
    """Latents (images, C, side, side) after captions of 24 tokens, the same at every call."""
    from transfusion.diffusion.sampler import make_scheduler
    from transfusion.generation import Guidance, denoise

    return denoise(
        model,
        _captions(case, images),
        (model.config.latent_channels, case.side, case.side),
        seeds=range(images),
        scheduler=make_scheduler(model.config.schedule),
        steps=steps,
        guidance=Guidance(3.0),
        impl=impl,
        on_step_end=on_step_end,
    )


def step_times(model: Transfusion, case: DenoiseCase, impl: str, steps: int) -> list[float]:
    """Seconds of each step but the first, which also reads the captions; `steps` must divide the training timesteps."""
    moments: list[float] = []

    def note(step: int, timestep: Any, latents: Tensor) -> Tensor:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return latents

    sample(model, case, impl, steps, case.images, note)
    return [after - before for before, after in pairwise(moments)]


def _captions(case: DenoiseCase, images: int) -> list[Document]:
    special = SpecialTokens()
    words = torch.randint(5, 1000, (images, 24), generator=torch.Generator().manual_seed(0))
    return [(Text(torch.cat([torch.tensor([special.bos]), each])),) for each in words]
