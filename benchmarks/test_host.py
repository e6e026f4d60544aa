"""What a call costs the host, under pytest-benchmark: the cases and checks of `python -m benchmarks --suite host`."""

from typing import Any

import pytest
import torch

from benchmarks import host
from benchmarks.gate import failures


@pytest.mark.skipif(bool(host.why_not()), reason=str(host.why_not()))
@pytest.mark.parametrize(("case", "baseline"), host.pairs())
def test_host(benchmark: Any, case: str, baseline: str) -> None:
    """Seconds in which the host has queued one call."""
    assert not failures(host.check(case, baseline))
    benchmark.group = f"host's share of {case}"
    benchmark.pedantic(host.call_of(case, baseline), setup=torch.cuda.synchronize, warmup_rounds=20, rounds=200)
