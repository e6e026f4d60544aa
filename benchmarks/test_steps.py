"""A training step and a denoising step under pytest-benchmark: the cases and checks of the suites train and denoise."""

from typing import Any

import pytest
import torch

from benchmarks import denoise, train
from benchmarks.clock import synchronized
from benchmarks.gate import failures
from benchmarks.models import random_model
from transfusion import presets


@pytest.mark.parametrize("baseline", [name for name in train.BASELINES if name != train.PEER])
@pytest.mark.parametrize("name", train.CASES)
def test_training_step(benchmark: Any, name: str, baseline: str) -> None:
    reason = train.why_not(baseline)
    if reason:
        pytest.skip(reason)
    case, attend = train.CASES[name], train.BASELINES[baseline]
    torch._dynamo.reset()
    assert not failures(train.check(case, attend))
    step = train.own_step(case)
    benchmark.group = f"training step {name}"
    with train.attention_by(attend):
        benchmark.pedantic(synchronized(lambda: step(0)), warmup_rounds=1, rounds=3)


@pytest.mark.skipif(bool(denoise.why_not()), reason=str(denoise.why_not()))
@pytest.mark.parametrize("baseline", denoise.BASELINES)
@pytest.mark.parametrize("name", denoise.CASES)
def test_denoising_steps(benchmark: Any, name: str, baseline: str) -> None:
    """Four steps, captions read."""
    case, impl = denoise.CASES[name], denoise.BASELINES[baseline]
    model = random_model(presets.get(case.preset)).eval()
    assert not failures(denoise.check(model, case, impl))
    benchmark.group = f"4 denoising steps {name}"
    benchmark.pedantic(lambda: denoise.sample(model, case, impl, 4, case.images), warmup_rounds=1, rounds=3)
