"""What a call costs the host: the time in which it is queued, on sizes so small that the device is never behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import DEVICE, DTYPE
from transfusion.kernels import IntervalMask, denoise_step, diffusion_loss, patchify_noise, transfusion_attention

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda", reason="without a device to queue work for, a call's time is its computation"
)


def image_calls() -> dict[str, Callable[[], Any]]:
    """The ops on image latents."""
    latents = torch.randn(2, 8, 8, 8, device=DEVICE)
    first, second = torch.rand(2, 2, device=DEVICE)
    seed, tokens = torch.tensor(5, device=DEVICE), torch.randn(2, 16, 32, device=DEVICE, dtype=DTYPE)
    coefficients = torch.rand(7, device=DEVICE)
    return {
        "patchify_noise": lambda: patchify_noise(latents, first, second, 2, seed=seed, dtype=DTYPE),
        "diffusion_loss": lambda: diffusion_loss(tokens, latents, first, second, 2, seed=seed),
        "denoise_step": lambda: denoise_step(tokens, latents, coefficients, 2, seed=seed),
    }


def attention_calls() -> dict[str, Callable[[], Any]]:
    """Attention under a mask whose tiles are made, as from the second layer on; beside it PyTorch's own, causal."""
    q, k, v = torch.randn(3, 1, 4, 128, 64, device=DEVICE, dtype=DTYPE).unbind()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    mask = IntervalMask.causal(128, DEVICE)
    one = IntervalMask.continuation(IntervalMask.causal(1, DEVICE), torch.tensor([100], device=DEVICE), 128)

    def ours() -> torch.Tensor:
        return transfusion_attention(*leaves, mask)

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(*leaves, is_causal=True)

    return {
        "attention": lambda: transfusion_attention(q, k, v, mask),
        "attention forward + backward": lambda: torch.autograd.grad(ours(), leaves, q),
        "attention, one token over a cache": lambda: transfusion_attention(q[:, :, :1], k, v, one),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "sdpa forward + backward": lambda: torch.autograd.grad(sdpa(), leaves, q),
    }


NAMES = [
    *("patchify_noise", "diffusion_loss", "denoise_step", "attention", "attention forward + backward"),
    *("attention, one token over a cache", "sdpa", "sdpa forward + backward"),
]


@pytest.mark.parametrize("name", NAMES)
def test_host_overhead(benchmark: Any, name: str) -> None:
    """Seconds of one call after warm-up, each begun with an idle device."""
    call = (image_calls() | attention_calls())[name]
    benchmark.group = "host overhead of a call"
    benchmark.pedantic(call, setup=torch.cuda.synchronize, warmup_rounds=20, rounds=200)
