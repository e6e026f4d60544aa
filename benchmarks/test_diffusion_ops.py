"""The ops on image latents under pytest-benchmark: the cases and checks of `python -m benchmarks --suite ops`, and what
that suite leaves out: images of different sizes, a sampler's step, and what a call costs the host."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ops
from benchmarks.cases import DEVICE, DTYPE, IMAGES, RAGGED_SIZES
from benchmarks.clock import synchronized
from benchmarks.gate import failures
from transfusion.kernels import RaggedLatents, denoise_step, diffusion_loss, patchify_noise
from transfusion.kernels.patchify_noise.reference import unpatchify
from transfusion.kernels.testing import judge

ON_GPU = DEVICE == "cuda"


@pytest.mark.parametrize("baseline", ops.BASELINES)
@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("name", IMAGES)
def test_image_op(benchmark: Any, name: str, op: str, baseline: str) -> None:
    """Forward, and for the loss forward + backward."""
    kind, noise = baseline.split(", ")
    if kind == "torch.compile" and not ON_GPU:
        pytest.skip("it needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    work, x = ops.work_of(op, kind), ops.make(name)
    assert not failures(ops.check(op, work, x, noise == "given" or kind != "ours"))
    benchmark.group = f"{op} {noise} {name}"

    def call() -> Any:
        result = work(x, noise == "given")
        return result if op == "patchify_noise" else torch.autograd.grad(result.sum(), x.prediction)

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


def eager_step(prediction: Tensor, latents: Tensor, base: Tensor, scale: Tensor, a: float, b: float, patch: int) -> Any:
    """Guidance in token order, unpatchify, and the linear update, as a sampler writes them."""
    guided = base + scale.view(-1, 1, 1) * (prediction - base)
    return a * latents + b * unpatchify(guided, latents.shape, patch)


@pytest.mark.parametrize("kind", ["ours", "eager", "torch.compile"])
@pytest.mark.parametrize("name", IMAGES)
def test_denoise_step(benchmark: Any, name: str, kind: str) -> None:
    """A guided, deterministic step. Bytes: two predictions and the latents in, the latents out."""
    if kind == "torch.compile" and not ON_GPU:
        pytest.skip("it needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    x, a, b = ops.make(name), 0.9, -0.3
    prediction, base = x.prediction.detach(), torch.randn_like(x.prediction)
    coefficients = torch.tensor([a, b, 0.0, 0.0, 0.0, 0.0, math.inf], device=DEVICE)
    eager = torch.compile(eager_step, dynamic=False) if kind == "torch.compile" else eager_step

    def call() -> Any:
        if kind == "ours":
            given = {"unconditional": base, "guidance": x.first}
            return denoise_step(prediction, x.latents, coefficients, x.patch, **given)
        return eager(prediction, x.latents, base, x.first, a, b, x.patch)

    wide = (t.double() for t in (prediction, x.latents, base, x.first))
    plain = eager_step(*(t.float() for t in (prediction, x.latents, base, x.first)), a, b, x.patch)
    # the coefficients that the op reads are float32
    assert judge(call(), plain, eager_step(*wide, *coefficients[:2].double().tolist(), x.patch)).passed
    benchmark.group = f"denoise_step {name}"
    benchmark.extra_info["bytes"] = 2 * prediction.nbytes + 2 * x.latents.nbytes
    benchmark.pedantic(synchronized(call), warmup_rounds=2, rounds=10)


@pytest.mark.skipif(not ON_GPU, reason="without a device to queue work for, a call's time is its computation")
@pytest.mark.parametrize("op", ["patchify_noise", "diffusion_loss", "denoise_step"])
def test_host_overhead(benchmark: Any, op: str) -> None:
    """Seconds in which the host has queued one call, on images so small that the device is never behind."""
    latents = torch.randn(2, 8, 8, 8, device=DEVICE)
    first, second = torch.rand(2, 2, device=DEVICE)
    seed, tokens = torch.tensor(5, device=DEVICE), torch.randn(2, 16, 32, device=DEVICE, dtype=DTYPE)
    coefficients = torch.rand(7, device=DEVICE)
    calls = {
        "patchify_noise": lambda: patchify_noise(latents, first, second, 2, seed=seed, dtype=DTYPE),
        "diffusion_loss": lambda: diffusion_loss(tokens, latents, first, second, 2, seed=seed),
        "denoise_step": lambda: denoise_step(tokens, latents, coefficients, 2, seed=seed),
    }
    benchmark.group = "host overhead of a call"
    benchmark.pedantic(calls[op], setup=torch.cuda.synchronize, warmup_rounds=20, rounds=200)
