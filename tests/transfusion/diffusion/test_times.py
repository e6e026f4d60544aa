"""TimeSampling: each image's distribution and limit, and how evenly a batch is spread."""

import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from transfusion.diffusion.times import TimeSampling

SPREADS = ["stratified", "antithetic", "independent"]


def fresh_generator() -> torch.Generator:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def distribution_distance(times: Tensor, sampling: TimeSampling) -> float:
    """Kolmogorov-Smirnov distance from the distribution that the sampling names, written plainly."""
    ordered = times.double().sort().values
    if sampling.distribution == "logit_normal":
        normal = (torch.logit(ordered) - sampling.mean) / sampling.std
        expected = 0.5 * torch.erfc(-normal / math.sqrt(2))
    else:
        expected = ordered
    steps = torch.arange(len(ordered)) / len(ordered)
    return torch.maximum((expected - steps).abs(), (expected - steps - 1 / len(ordered)).abs()).max().item()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("distribution", "mean", "std"), [("uniform", 0.0, 1.0), ("logit_normal", -0.5, 1.3)])
def test_distribution(distribution: str, mean: float, std: float, spread: str) -> None:
    """Of one image over many batches, so that the spread within a batch does not help."""
    sampling, generator = TimeSampling(distribution, mean, std, spread), fresh_generator()
    times = torch.stack([sampling.draw([1.0] * 5, generator) for _ in range(4000)])
    assert times.dtype == torch.float32 and (times >= 0).all() and (times < 1).all()
    for image in times.T:
        # P(sqrt(n)·D > x) -> 2·exp(-2x²), here 3e-8.
        assert distribution_distance(image, sampling) * math.sqrt(4000) < 3.0


def test_the_default_is_stratified_uniform() -> None:
    """time_i = limit_i·(slot_i + jitter_i) / I, bitwise."""
    seed, limits = random.randrange(2**32), [1.0, 0.5, 1.0, 0.25, 1.0]
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(5, generator=generator) + torch.rand(5, generator=generator)
    expected = (slots / 5).clamp(max=1 - 2**-24) * torch.tensor(limits)
    assert torch.equal(TimeSampling().draw(limits, torch.Generator().manual_seed(seed)), expected)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_are_those_of_the_seed_whatever_torchs_defaults(
    distribution: str, spread: str, elsewhere: Callable[[], AbstractContextManager[None]]
) -> None:
    sampling, seed = TimeSampling(distribution, spread=spread), random.randrange(2**32)
    wanted = sampling.draw([1.0] * 5, torch.Generator().manual_seed(seed))
    with elsewhere():
        torch.set_default_dtype(torch.float64)
        found = sampling.draw([1.0] * 5, torch.Generator().manual_seed(seed))
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_stratified_has_one_image_in_each_part(count: int) -> None:
    times = TimeSampling().draw([1.0] * count, fresh_generator())
    assert (times.double() * count).floor().sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("count", [2, 7, 64])
def test_antithetic_times_come_in_pairs(count: int) -> None:
    times = TimeSampling(spread="antithetic").draw([1.0] * count, fresh_generator()).double()
    partner = (times[:, None] + times[None, :] - 1).abs()
    assert ((partner <= 2**-24).sum(1) >= 1).sum() >= 2 * (count // 2)


def test_limits() -> None:
    generator, limits = fresh_generator(), [1.0, 0.5, 0.9] * 200
    for spread in SPREADS:
        times = TimeSampling(spread=spread, max_time=0.7).draw(limits, generator)
        most = torch.tensor([0.7, 0.5, 0.7] * 200)
        assert (times < most).all() and (times > 0.8 * most).any()
    assert TimeSampling().draw([], generator).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "normal"}, "distribution='normal' is not one of uniform, logit_normal"),
        ({"spread": "even"}, "spread='even' is not one of stratified"),
        ({"mean": math.inf}, "mean=inf"),
        ({"std": 0.0}, r"std=0\.0"),
        ({"max_time": 0.0}, r"max_time=0\.0"),
        ({"max_time": 1.5}, r"max_time=1\.5"),
    ],
)
def test_refuses_what_it_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeSampling(**options)
