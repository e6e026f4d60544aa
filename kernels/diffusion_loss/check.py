"""How `diffusion_loss` is judged: loss and gradient against the formula in float64, on random inputs.

The loss is a sum, judged with the formula in several orders of summation; its gradient is element by element. See
`transfusion.kernels.testing.judge`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.diffusion_loss import reference
from transfusion.kernels.diffusion_loss.op import diffusion_loss
from transfusion.kernels.patchify_noise.check import SHAPES, SOURCES
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.testing import Verdict, judge


class Case(NamedTuple):
    """Everything `diffusion_loss` reads but its source of noise."""

    prediction: Tensor
    latents: Tensor
    data_weight: Tensor
    noise_weight: Tensor
    patch_size: int
    noise: Tensor
    seed: Tensor

    def source(self, name: str) -> dict[str, Any]:
        """`noise=` or `seed=`."""
        return {name: getattr(self, name)}

    def wide(self) -> "Case":
        """The same in float64."""
        return self._replace(
            prediction=self.prediction.detach().double(), latents=self.latents.double(), noise=self.noise.double()
        )


def make_case(
    shape: tuple[int, int, int, int],
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Case:
    """Normal prediction (of `dtype`), latents, noise, weights in [0.5, 1), any seed, drawn from a CPU generator."""
    images, channels, height, width = shape
    tokens = (images, height * width // patch_size**2, patch_size**2 * channels)
    prediction = torch.randn(tokens, generator=generator).to(device, dtype)
    latents, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    data_weight, noise_weight = (0.5 + 0.5 * torch.rand(images, generator=generator).to(device) for _ in range(2))
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator).to(device)
    return Case(prediction, latents, data_weight, noise_weight, patch_size, noise, seed)


def run(case: Case, source: str, impl: str) -> Tensor:
    """The loss of each image."""
    return diffusion_loss(*case[:5], **case.source(source), impl=impl)


def eager_orders(case: Case, source: str, count: int = 8) -> list[Tensor]:
    """The formula in float32, `count` times with the elements of the sum reordered."""
    target = patchify_noise(*case[1:5], **case.source(source), impl="reference", dtype=torch.float32)
    squares = (case.prediction.float() - target).square().flatten(1)
    return [squares[:, torch.randperm(squares.shape[1])].mean(1) for _ in range(count)]


def verdicts(case: Case, source: str, grad_loss: Tensor) -> dict[str, Verdict]:
    """The Triton kernels' loss and gradient of the prediction."""
    prediction = case.prediction.detach().requires_grad_()
    loss = run(case._replace(prediction=prediction), source, "triton")
    (grad,) = torch.autograd.grad(loss, prediction, grad_loss)

    def gradient(of: Case) -> Tensor:
        noise, seed = (of.noise, None) if source == "noise" else (None, of.seed)
        return reference.backward(
            grad_loss, of.prediction, of.latents, of.data_weight, of.noise_weight, noise, seed, of.patch_size
        )

    return {
        "loss": judge(loss.detach(), eager_orders(case, source), run(case.wide(), source, "reference")),
        "grad_prediction": judge(grad, gradient(case), gradient(case.wide()), factor=1.0),
    }


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, Verdict]]]:
    """(what, verdicts) of the Triton kernels over shapes, patch sizes and sources of noise."""
    for shape, patch_size in SHAPES:
        for source in SOURCES:
            case = make_case(shape, patch_size, dtype, device, generator)
            grad_loss = 0.5 + 0.5 * torch.rand(shape[0], generator=generator).to(device)
            yield f"{'x'.join(map(str, shape))}_patch_{patch_size}_{source}", verdicts(case, source, grad_loss)
