"""patchify_noise and diffusion_loss against the eager chain; bytes are each input once and each output once."""

from typing import Any

import pytest
import torch
from einops import rearrange

from benchmarks.cases import DEVICE, IMAGES
from benchmarks.test_attention import synchronized
from transfusion.kernels import diffusion_loss, patchify_noise
from transfusion.kernels.testing import judge

IMPLEMENTATIONS = ["triton", "reference", "eager"] if DEVICE == "cuda" else ["reference", "eager"]


def eager_tokens(latents: Any, alpha: Any, sigma: Any, patch: int, noise: Any) -> Any:
    noised = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
    return rearrange(noised, "i c (y p) (x q) -> i (y x) (p q c)", p=patch, q=patch)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", IMAGES)
def test_patchify_noise(benchmark: Any, name: str, impl: str) -> None:
    *shape, patch = IMAGES[name]
    latents, noise = torch.randn(2, *shape, device=DEVICE)
    alpha, sigma = torch.rand(2, shape[0], device=DEVICE)

    def work() -> Any:
        if impl == "eager":
            return eager_tokens(latents, alpha, sigma, patch, noise)
        return patchify_noise(latents, alpha, sigma, patch, noise=noise, impl=impl)

    gold = eager_tokens(*(t.double() for t in (latents, alpha, sigma)), patch, noise.double())
    verdict = judge(work(), eager_tokens(latents, alpha, sigma, patch, noise), gold, factor=1)
    assert verdict.passed, (impl, verdict)
    benchmark.group = f"patchify_noise {name}"
    benchmark.extra_info["bytes"] = 3 * latents.numel() * 4
    benchmark.pedantic(synchronized(work), warmup_rounds=2, rounds=10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", IMAGES)
def test_diffusion_loss(benchmark: Any, name: str, impl: str) -> None:
    *shape, patch = IMAGES[name]
    latents, noise = torch.randn(2, *shape, device=DEVICE)
    data, eps = torch.rand(2, shape[0], device=DEVICE)
    prediction = torch.randn_like(eager_tokens(latents, data, eps, patch, noise)).requires_grad_()

    def work() -> Any:
        if impl == "eager":
            target = eager_tokens(latents, data, eps, patch, noise)
            loss = (prediction - target).square().mean((1, 2))
        else:
            loss = diffusion_loss(prediction, latents, data, eps, patch, noise=noise, impl=impl)
        return loss, torch.autograd.grad(loss.sum(), prediction)[0]

    wide = [t.detach().double() for t in (latents, data, eps, noise, prediction)]
    target = eager_tokens(*wide[:3], patch, wide[3])
    gold = (wide[4] - target).square().mean((1, 2))
    eager = (prediction.detach() - eager_tokens(latents, data, eps, patch, noise)).square().mean((1, 2))
    verdict = judge(work()[0].detach(), eager, gold)
    assert verdict.passed, (impl, verdict)
    benchmark.group = f"diffusion_loss forward + backward {name}"
    benchmark.extra_info["bytes"] = (2 * latents.numel() * 2 + 3 * prediction.numel()) * 4
    benchmark.pedantic(synchronized(work), warmup_rounds=2, rounds=10)
