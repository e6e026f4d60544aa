"""How `denoise_step` is judged: the next latents against the formula in float64, on random inputs.

An op that works element by element has the error of the formula in its own precision, see
`transfusion.kernels.testing.judge`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.denoise_step.op import denoise_step
from transfusion.kernels.image_contract import Latents, unwrap
from transfusion.kernels.patchify_noise.check import (
    SHAPES,
    Shape,
    as_double,
    as_latents,
    make_weights,
    num_images,
    shape_name,
    tokens_shape,
)
from transfusion.kernels.testing import Verdict, judge

# guided and clipped with noise given, guided with noise from a seed, neither.
KINDS = ("noise", "seed", "plain")


class Case(NamedTuple):
    """What `denoise_step` reads, the optional parts in `options`."""

    prediction: Tensor
    latents: Latents
    coefficients: Tensor
    patch_size: int
    options: dict[str, Tensor]

    def wide(self) -> "Case":
        """The same in float64, but for what must be float32."""
        stays = ("guidance", "seed")
        options = {name: value if name in stays else value.double() for name, value in self.options.items()}
        return self._replace(prediction=self.prediction.double(), latents=as_double(self.latents), options=options)


def make_case(
    kind: str,
    shape: Shape,
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Case:
    """Normal prediction, latents (both of `dtype`) and noise, coefficients in ±[0.5, 1), a limit that clips.

    a has the sign of d·p: the terms of x do not cancel, or the errors of a few elements would exceed every result.
    """
    tokens = tokens_shape(shape, patch_size)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator).to(device, dtype)

    latents = as_latents(normal().flatten(), shape)
    coefficients = make_weights(7, device, generator)
    coefficients[0] = coefficients[0].copysign(coefficients[2] * coefficients[4])
    coefficients[6] = math.inf if kind == "plain" else 0.7
    options: dict[str, Any] = {}
    if kind != "plain":
        options = {
            "unconditional": normal(),
            "guidance": 3.0 * make_weights(num_images(shape), device, generator).abs(),
        }
    if kind == "noise":
        options["noise"] = unwrap(as_latents(normal().flatten(), shape))[0]
    if kind == "seed":
        options["seed"] = torch.randint(-(2**63), 2**63 - 1, (), generator=generator).to(device)
    return Case(normal(), latents, coefficients, patch_size, options)


def run(case: Case, impl: str) -> Tensor:
    """The tensor of the next latents."""
    prediction, latents, coefficients, patch_size, options = case
    return unwrap(denoise_step(prediction, latents, coefficients, patch_size, impl=impl, **options))[0]


def verdicts(case: Case) -> dict[str, Verdict]:
    """The Triton kernel's next latents."""
    gold = run(case.wide(), "reference")
    return {"latents": judge(run(case, "triton"), run(case, "reference"), gold, factor=1.0)}


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], dict[str, Verdict]]]]:
    """(what, a call that judges it), in turn, of the Triton kernel over shapes, patch sizes and kinds of step."""
    for shape, patch_size in SHAPES:
        for kind in KINDS:
            case = make_case(kind, shape, patch_size, dtype, device, generator)
            yield f"{shape_name(shape)}_patch_{patch_size}_{kind}", partial(verdicts, case)
