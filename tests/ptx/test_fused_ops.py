"""patchify_noise, diffusion_loss, denoise_step as they ship for sm_90: the cases that `verify` judges, by its rule."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.kernels import RaggedLatents, denoise_step, diffusion_loss, patchify_noise, verify

OPS = ["patchify_noise", "diffusion_loss", "denoise_step"]


@pytest.mark.parametrize("op", OPS)
def test_every_case_in_bfloat16(device: None, op: str, seed: int) -> None:
    """Which the interpreter, that judges the other dtypes in every test run, computes wrongly."""
    cases = verify.CHECKS[op](torch.device("cpu"), torch.bfloat16, torch.Generator().manual_seed(seed))
    checked = [(case, check()) for case, check in cases]
    failed = [(case, verdicts) for case, verdicts in checked if not all(each.passed for each in verdicts.values())]
    assert checked and not failed


@pytest.mark.parametrize("op", OPS)
def test_cases_in_another_dtype(device: None, op: str, seed: int) -> None:
    dtype = random.Random(seed).choice([torch.float16, torch.float32])
    cases = verify.CHECKS[op](torch.device("cpu"), dtype, torch.Generator().manual_seed(seed))
    for case, check in itertools.islice(cases, 6):
        verdicts = check()
        assert all(verdict.passed for verdict in verdicts.values()), (dtype, case, verdicts)


@pytest.mark.parametrize(
    ("channels", "sizes", "patch_size"), [(3, [(4, 6), (8, 2)], 2), (1, [(1, 1)] * 3, 1)], ids=["several", "one_number"]
)
def test_ragged_images_are_a_loop_of_dense_ones(
    device: None, seed: int, channels: int, sizes: list[tuple[int, int]], patch_size: int
) -> None:
    """Bit for bit, of two kernels that are compiled apart: neither fuses a product that the other does not."""
    generator = torch.Generator().manual_seed(seed)
    images, noise = ([torch.randn(channels, *size, generator=generator) for size in sizes] for _ in range(2))
    features = channels * patch_size**2
    ragged, drawn = RaggedLatents.pack(images), torch.cat([each.flatten() for each in noise])
    alpha, sigma = torch.rand(2, len(sizes), generator=generator)
    coefficients = torch.randn(7, generator=generator)
    prediction = torch.randn(ragged.values.numel() // features, features, generator=generator, requires_grad=True)

    def calls(prediction: Tensor, latents: Any, alpha: Tensor, sigma: Tensor, noise: Tensor) -> list[Tensor]:
        loss = diffusion_loss(prediction, latents, alpha, sigma, patch_size, noise=noise, impl="triton")
        grad = torch.autograd.grad(loss.sum(), prediction)[0]
        tokens = patchify_noise(latents, alpha, sigma, patch_size, noise=noise, impl="triton")
        after = denoise_step(prediction.detach(), latents, coefficients, patch_size, noise=noise, impl="triton")
        return [tokens, grad, after.values if isinstance(after, RaggedLatents) else after]

    together = calls(prediction, ragged, alpha, sigma, drawn)
    counts = [image.numel() // features for image in images]
    alone = [
        calls(part[None], image[None], alpha[i : i + 1], sigma[i : i + 1], z[None])
        for i, (part, image, z) in enumerate(zip(prediction.split(counts), images, noise, strict=True))
    ]
    for whole, *parts in zip(together, *alone, strict=True):
        assert torch.equal(whole.flatten(), torch.cat([part.flatten() for part in parts]))
