"""How `diffusion_loss` is judged: loss and gradient against the formula in float64, on random inputs.

The loss is a sum, judged with the formula in several orders of summation; its gradient is element by element. See
`transfusion.kernels.testing.judge`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.diffusion_loss import reference
from transfusion.kernels.diffusion_loss.op import diffusion_loss
from transfusion.kernels.image_contract import Latents, unwrap
from transfusion.kernels.patchify_noise.check import (
    SHAPES,
    SOURCES,
    Shape,
    as_double,
    as_latents,
    layout_or_none,
    make_weights,
    num_images,
    shape_name,
    tokens_shape,
)
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.ragged_latents import RaggedLatents
from transfusion.kernels.testing import Verdict, judge


class Case(NamedTuple):
    """Everything `diffusion_loss` reads but its source of noise."""

    prediction: Tensor
    latents: Latents
    data_weight: Tensor
    noise_weight: Tensor
    patch_size: int
    noise: Tensor
    seed: Tensor
    weight: Tensor | None

    def source(self, name: str) -> dict[str, Any]:
        """`noise=` or `seed=`."""
        return {name: getattr(self, name)}

    def wide(self) -> "Case":
        """The same in float64."""
        prediction, latents = self.prediction.detach().double(), as_double(self.latents)
        return self._replace(prediction=prediction, latents=latents, noise=self.noise.double())


def make_case(
    shape: Shape,
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Case:
    """Normal prediction (of `dtype`), latents and noise, `make_weights`, any seed, drawn from a CPU generator."""
    tokens, images = tokens_shape(shape, patch_size), num_images(shape)
    prediction = torch.randn(tokens, generator=generator).to(device, dtype)
    latents, noise = (
        as_latents(torch.randn(math.prod(tokens), generator=generator).to(device), shape) for _ in range(2)
    )
    data_weight, noise_weight, weight = (make_weights(images, device, generator) for _ in range(3))
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator).to(device)
    return Case(prediction, latents, data_weight, noise_weight, patch_size, unwrap(noise)[0], seed, weight)


def run(case: Case, source: str, impl: str) -> Tensor:
    """The loss of each image."""
    return diffusion_loss(*case[:5], **case.source(source), weight=case.weight, impl=impl)


def gradient(case: Case, source: str, impl: str, grad_loss: Tensor) -> Tensor:
    """Of the prediction."""
    prediction = case.prediction.detach().requires_grad_()
    loss = run(case._replace(prediction=prediction), source, impl)
    return torch.autograd.grad(loss, prediction, grad_loss.to(loss.dtype))[0]


def formula_gradient(case: Case, source: str, grad_loss: Tensor) -> Tensor:
    """`reference.backward`."""
    values, layout = unwrap(case.latents)[0], layout_or_none(case.latents)
    noise, seed = (case.noise, None) if source == "noise" else (None, case.seed)
    inputs = grad_loss, case.prediction, values, case.data_weight, case.noise_weight
    return reference.backward(*inputs, noise, seed, case.weight, case.patch_size, layout)


def eager_orders(case: Case, source: str, count: int = 64) -> list[Tensor]:
    """The formula in float32, `count` times with the elements of the sum reordered, at every call alike."""
    generator = torch.Generator().manual_seed(0)
    target = patchify_noise(*case[1:5], **case.source(source), impl="reference", dtype=torch.float32)
    squares = (case.prediction.float() - target).square()
    if isinstance(case.latents, RaggedLatents):
        tokens = [height * width // case.patch_size**2 for height, width in case.latents.sizes]
        images = [part.flatten() for part in squares.split(tokens)]
    else:
        images = list(squares.flatten(1))
    weight = torch.ones(len(images), device=squares.device) if case.weight is None else case.weight

    def shuffled(image: Tensor) -> Tensor:
        return image[torch.randperm(len(image), generator=generator).to(image.device)]

    return [weight * torch.stack([shuffled(image).mean() for image in images]) for _ in range(count)]


def verdicts(case: Case, source: str, grad_loss: Tensor) -> dict[str, Verdict]:
    """The Triton kernels' loss and gradient of the prediction."""
    loss, grad = run(case, source, "triton"), gradient(case, source, "triton", grad_loss)
    gold = run(case.wide(), source, "reference")
    eager_grad, gold_grad = (formula_gradient(of, source, grad_loss) for of in (case, case.wide()))
    return {
        "loss": judge(loss.detach(), eager_orders(case, source), gold),
        "grad_prediction": judge(grad, eager_grad, gold_grad, factor=1.0),
    }


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], dict[str, Verdict]]]]:
    """(what, a call that judges it), in turn, of the Triton kernels over shapes, patch sizes, sources of noise, weights
    or none."""
    for number, (shape, patch_size) in enumerate(SHAPES):
        for source in SOURCES:
            case = make_case(shape, patch_size, dtype, device, generator)
            if number % 2:
                case = case._replace(weight=None)
            grad_loss = make_weights(num_images(shape), device, generator)
            yield f"{shape_name(shape)}_patch_{patch_size}_{source}", partial(verdicts, case, source, grad_loss)
