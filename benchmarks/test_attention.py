"""Attention under pytest-benchmark: the cases, baselines and checks of `python -m benchmarks --suite attention`."""

from typing import Any

import pytest
import torch

from benchmarks.attention import fresh, inputs
from benchmarks.baselines import BASELINES
from benchmarks.cases import ATTENTION
from benchmarks.clock import synchronized
from benchmarks.gate import failures, verdicts

MEASURES = [
    (case, baseline, measure)
    for case, shape in ATTENTION.items()
    for baseline, adapter in BASELINES.items()
    for measure in adapter.measures
    if (measure != "backward" or shape.backward) and not adapter.why_not(shape)
]


@pytest.mark.parametrize(("case_name", "baseline_name", "measure"), MEASURES)
def test_attention(benchmark: Any, case_name: str, baseline_name: str, measure: str) -> None:
    case, baseline = ATTENTION[case_name], BASELINES[baseline_name]
    torch._dynamo.reset()
    (leaves,), host = inputs(case, copies=1), case.mask()
    mask = baseline.mask(case, fresh(host))
    prepared = baseline.prepare(mask, *leaves)
    benchmark.group = f"attention {measure} {case_name}"
    if measure == "prepare":
        work = lambda: baseline.prepare(fresh(host), *leaves)  # noqa: E731
    else:
        assert not failures(verdicts(baseline, prepared, mask, leaves, case.backward, seed=torch.seed() % 2**31))
        area = int(mask.area().sum()) * (case.batch if mask.batch_size == 1 else 1)
        benchmark.extra_info["flops"] = (10 if measure == "backward" else 4) * area * case.heads * case.head_dim
        work = lambda: baseline(prepared, *leaves)  # noqa: E731
    if measure == "backward":
        out = baseline(prepared, *leaves)
        above = torch.randn_like(out)
        work = lambda: torch.autograd.grad(out, leaves, above, retain_graph=True)  # noqa: E731
    benchmark.pedantic(synchronized(work), warmup_rounds=1, rounds=5)
