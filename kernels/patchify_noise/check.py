"""How `patchify_noise` is judged: tokens and gradient against the formula in float64, on random inputs.

An op that works element by element has the error of the formula in its own precision, see
`transfusion.kernels.testing.judge`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.patchify_noise import reference
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.testing import Verdict, judge

# (I, C, h, w), P: several tiles, quads across rows, planes without quads, two channel blocks, a single pixel.
SHAPES: list[tuple[tuple[int, int, int, int], int]] = [
    ((2, 8, 16, 16), 2),
    ((2, 3, 32, 32), 8),
    ((3, 2, 2, 6), 1),
    ((3, 3, 5, 7), 1),
    ((1, 5, 9, 15), 3),
    ((2, 20, 8, 12), 4),
    ((16, 1, 1, 1), 1),
]
SOURCES = ("noise", "seed")


class Case(NamedTuple):
    """Everything `patchify_noise` reads but its source of noise."""

    latents: Tensor
    alpha: Tensor
    sigma: Tensor
    patch_size: int
    noise: Tensor
    seed: Tensor

    def source(self, name: str) -> dict[str, Any]:
        """`noise=` or `seed=`."""
        return {name: getattr(self, name)}


def make_case(
    shape: tuple[int, int, int, int],
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Case:
    """Normal latents and noise, weights in [0.5, 1), any seed, drawn from a CPU generator.

    Weights near zero would leave results of few bits, and little to measure an error against.
    """
    latents, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    alpha, sigma = (0.5 + 0.5 * torch.rand(shape[0], generator=generator).to(device) for _ in range(2))
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator).to(device)
    return Case(latents, alpha, sigma, patch_size, noise, seed)


def run(case: Case, source: str, impl: str) -> Tensor:
    """The tokens."""
    return patchify_noise(*case[:4], **case.source(source), impl=impl)


def gold_of(case: Case, source: str) -> Tensor:
    """The tokens in float64."""
    return run(case._replace(latents=case.latents.double(), noise=case.noise.double()), source, "reference")


def verdicts(case: Case, source: str, grad_tokens: Tensor) -> dict[str, Verdict]:
    """The Triton kernels' tokens and gradient of the latents."""
    latents = case.latents.detach().requires_grad_()
    tokens = run(case._replace(latents=latents), source, "triton")
    (grad,) = torch.autograd.grad(tokens, latents, grad_tokens)
    eager, gold = (
        reference.backward(grad_tokens, case.alpha, case.latents.shape, case.patch_size, dtype)
        for dtype in (case.latents.dtype, torch.float64)
    )
    return {
        "tokens": judge(tokens.detach(), run(case, source, "reference"), gold_of(case, source), factor=1.0),
        "grad_latents": judge(grad, eager, gold, factor=1.0),
    }


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, Verdict]]]:
    """(what, verdicts) of the Triton kernels over shapes, patch sizes and sources of noise."""
    for shape, patch_size in SHAPES:
        for source in SOURCES:
            case = make_case(shape, patch_size, dtype, device, generator)
            grad_tokens = torch.randn(run(case, source, "reference").shape, generator=generator).to(device, dtype)
            name = f"{'x'.join(map(str, shape))}_patch_{patch_size}_{source}"
            yield name, verdicts(case, source, grad_tokens)
