"""How `patchify_noise` is judged: tokens and gradient against the formula in float64, on random inputs.

An op that works element by element has the error of the formula in its own precision, see
`transfusion.kernels.testing.judge`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.image_contract import Latents, unwrap
from transfusion.kernels.patchify_noise import reference
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.ragged_latents import Layout, RaggedLatents
from transfusion.kernels.testing import Verdict, judge


class Ragged(NamedTuple):
    """The shape of a ragged batch: C and (h, w) of each image."""

    channels: int
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.channels}x(" + ",".join(f"{height}x{width}" for height, width in self.sizes) + ")"


Shape = tuple[int, int, int, int] | Ragged

# (I, C, h, w), P: several tiles, quads across rows, planes without quads, two channel blocks, a single pixel; then
# ragged: several tiles, two channel blocks, planes and offsets without quads. None has fewer than 250 numbers, by which
# to tell how much the formula errs; images of one number are tested bit for bit.
SHAPES: list[tuple[Shape, int]] = [
    ((2, 8, 16, 16), 2),
    ((2, 3, 32, 32), 8),
    ((3, 8, 2, 6), 1),
    ((3, 3, 5, 7), 1),
    ((1, 5, 9, 15), 3),
    ((2, 20, 8, 12), 4),
    ((4, 64, 1, 1), 1),
    (Ragged(8, ((4, 6), (16, 20), (2, 2), (8, 4))), 2),
    (Ragged(20, ((8, 8), (16, 8), (8, 24))), 8),
    (Ragged(5, ((3, 5), (7, 1), (20, 17))), 1),
]
SOURCES = ("noise", "seed")


def shape_name(shape: Shape) -> str:
    """Such as "2x8x16x16"."""
    return str(shape) if isinstance(shape, Ragged) else "x".join(map(str, shape))


def num_images(shape: Shape) -> int:
    """I."""
    return len(shape.sizes) if isinstance(shape, Ragged) else shape[0]


def tokens_shape(shape: Shape, patch_size: int) -> tuple[int, ...]:
    """(I, n, P·P·C), or (T, P·P·C)."""
    area = patch_size * patch_size
    if isinstance(shape, Ragged):
        return sum(math.prod(size) for size in shape.sizes) // area, area * shape.channels
    return shape[0], shape[2] * shape[3] // area, area * shape[1]


def as_latents(values: Tensor, shape: Shape) -> Latents:
    """Flat values in the shape."""
    return RaggedLatents(values, *shape) if isinstance(shape, Ragged) else values.view(shape)


def layout_or_none(latents: Latents) -> Layout | None:
    """What the references take."""
    return latents.layout if isinstance(latents, RaggedLatents) else None


def as_double(latents: Latents) -> Latents:
    """The same in float64."""
    return latents.with_values(latents.values.double()) if isinstance(latents, RaggedLatents) else latents.double()


class Case(NamedTuple):
    """Everything `patchify_noise` reads but its source of noise."""

    latents: Latents
    alpha: Tensor
    sigma: Tensor
    patch_size: int
    noise: Tensor
    seed: Tensor

    def source(self, name: str) -> dict[str, Any]:
        """`noise=` or `seed=`."""
        return {name: getattr(self, name)}

    def wide(self) -> "Case":
        """The same in float64."""
        return self._replace(latents=as_double(self.latents), noise=self.noise.double())


def make_weights(images: int, device: torch.device | str, generator: torch.Generator) -> Tensor:
    """(I,) in ±[0.5, 1): the error of an element is judged by the largest of all, so none may be scaled far beyond."""
    magnitude, sign = torch.rand(2, images, generator=generator)
    return ((0.5 + 0.5 * magnitude) * torch.where(sign < 0.5, -1, 1)).to(device)


def make_case(
    shape: Shape,
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Case:
    """Normal latents and noise, `make_weights`, any seed, drawn from a CPU generator."""
    count = math.prod(tokens_shape(shape, patch_size))
    latents, noise = (as_latents(torch.randn(count, generator=generator).to(device, dtype), shape) for _ in range(2))
    alpha, sigma = (make_weights(num_images(shape), device, generator) for _ in range(2))
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator).to(device)
    return Case(latents, alpha, sigma, patch_size, unwrap(noise)[0], seed)


def run(case: Case, source: str, impl: str, **options: Any) -> Tensor:
    """The tokens."""
    given = case.source(source) | options
    return patchify_noise(case.latents, case.alpha, case.sigma, case.patch_size, impl=impl, **given)


def gradient(case: Case, source: str, impl: str, grad_tokens: Tensor) -> Tensor:
    """Of the latents' tensor."""
    leaf = unwrap(case.latents)[0].detach().requires_grad_()
    latents = case.latents.with_values(leaf) if isinstance(case.latents, RaggedLatents) else leaf
    tokens = run(case._replace(latents=latents), source, impl)
    return torch.autograd.grad(tokens, leaf, grad_tokens.to(tokens.dtype))[0]


def formula_gradient(case: Case, grad_tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.backward` in `dtype`."""
    values, layout = unwrap(case.latents)[0], layout_or_none(case.latents)
    return reference.backward(grad_tokens, case.alpha, values.shape, dtype, case.patch_size, layout)


def verdicts(case: Case, source: str, grad_tokens: Tensor) -> dict[str, Verdict]:
    """The Triton kernels' tokens and gradient of the latents."""
    tokens, grad = run(case, source, "triton"), gradient(case, source, "triton", grad_tokens)
    eager, gold = (formula_gradient(case, grad_tokens, dtype) for dtype in (grad.dtype, torch.float64))
    return {
        "tokens": judge(tokens, run(case, source, "reference"), run(case.wide(), source, "reference"), factor=1.0),
        "grad_latents": judge(grad, eager, gold, factor=1.0),
    }


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], dict[str, Verdict]]]]:
    """(what, a call that judges it), in turn, of the Triton kernels over shapes, patch sizes and sources of noise."""
    for shape, patch_size in SHAPES:
        for source in SOURCES:
            case = make_case(shape, patch_size, dtype, device, generator)
            grad_tokens = torch.randn(tokens_shape(shape, patch_size), generator=generator).to(device, dtype)
            yield f"{shape_name(shape)}_patch_{patch_size}_{source}", partial(verdicts, case, source, grad_tokens)
