"""The ops on image latents under pytest-benchmark: the cases and checks of `python -m benchmarks --suite ops`, and what
that suite leaves out: images of different sizes."""

from typing import Any

import pytest
import torch

from benchmarks import ops
from benchmarks.cases import DEVICE, DTYPE, RAGGED_SIZES
from benchmarks.clock import synchronized
from benchmarks.gate import failures
from transfusion.kernels import RaggedLatents, patchify_noise

ON_GPU = DEVICE == "cuda"


@pytest.mark.parametrize(("case", "baseline"), ops.pairs())
def test_image_op(benchmark: Any, case: str, baseline: str) -> None:
    """Forward, and for what has a gradient forward + backward."""
    op, name = case.split(" ", 1)
    kind, noise = baseline.split(", ")
    if kind == "torch.compile" and not ON_GPU:
        pytest.skip("it needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    work, x = ops.work_of(op, kind), ops.make(name)
    assert not failures(ops.check(op, kind, x, noise))
    benchmark.group = f"{op} {noise} {name}"

    def call() -> Any:
        result = work(x, noise)
        return torch.autograd.grad(result.sum(), x.prediction) if result.requires_grad else result

    benchmark.pedantic(synchronized(call), warmup_rounds=2, rounds=10)


@pytest.mark.parametrize("form", ["ragged", "loop of dense calls"])
def test_images_of_different_sizes(benchmark: Any, form: str) -> None:
    """One launch for all sizes, against one for each size."""
    repeats = 100 if ON_GPU else 2
    sizes, count = RAGGED_SIZES * repeats, len(RAGGED_SIZES) * repeats
    latents = RaggedLatents.pack([torch.randn(8, *size, device=DEVICE) for size in sizes])
    alpha, sigma = torch.rand(2, count, device=DEVICE)
    seed, kinds = torch.tensor(5, device=DEVICE), len(RAGGED_SIZES)
    groups = [torch.stack(latents.images()[kind::kinds]) for kind in range(kinds)]
    benchmark.group = f"patchify_noise of {count} images of {kinds} sizes"

    def call() -> Any:
        if form == "ragged":
            return patchify_noise(latents, alpha, sigma, 2, seed=seed, dtype=DTYPE)
        weights = [(alpha[kind::kinds], sigma[kind::kinds]) for kind in range(kinds)]
        return [patchify_noise(x, *w, 2, seed=seed, dtype=DTYPE) for x, w in zip(groups, weights, strict=True)]

    benchmark.pedantic(synchronized(call), warmup_rounds=2, rounds=10)
