"""patchify_noise: both implementations against the float64 gold, and the contract of the op."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from transfusion.kernels import RaggedLatents
from transfusion.kernels.patchify_noise import kernel, op, reference
from transfusion.kernels.patchify_noise.check import (
    SHAPES,
    SOURCES,
    Case,
    Shape,
    formula_gradient,
    gradient,
    run,
    shape_name,
    tokens_shape,
    verdicts,
)
from transfusion.kernels.patchify_noise.check import make_case as draw_case
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.philox import randn
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import judge, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly; on a device all three run.
DTYPES = [torch.float32, torch.float16] + ([] if TRITON_INTERPRET else [torch.bfloat16])
IMPLS = ["triton", "reference"]
SHAPE_NAMES = [f"{shape_name(shape)} patch {patch_size}" for shape, patch_size in SHAPES]


def make_case(shape: Shape, patch_size: int, dtype: torch.dtype = torch.float32) -> Case:
    input_seed = random.randrange(2**32)
    print(f"input seed {input_seed}")
    return draw_case(shape, patch_size, dtype, DEVICE, torch.Generator().manual_seed(input_seed))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "patch_size"), SHAPES, ids=SHAPE_NAMES)
def test_kernels_against_gold(
    shape: Shape, patch_size: int, dtype: torch.dtype, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(shape, patch_size, dtype)
    grad_tokens = torch.randn(tokens_shape(shape, patch_size), device=DEVICE, dtype=dtype)
    poison_empty(monkeypatch.setattr)
    found = verdicts(case, source, grad_tokens)
    assert all(verdict.passed for verdict in found.values()), found
    tokens = run(case, source, "triton")
    assert tokens.dtype == dtype and tokens.is_contiguous() and tokens.shape == grad_tokens.shape


def test_reference_is_the_formula() -> None:
    case = make_case((3, 5, 8, 12), 4, torch.float64)
    noised = torch.einsum("i,ichw->ichw", case.alpha.double(), case.latents)
    noised = noised + torch.einsum("i,ichw->ichw", case.sigma.double(), case.noise)
    expected = rearrange(noised, "i c (y p) (x q) -> i (y x) (p q c)", p=4, q=4)
    assert torch.equal(run(case, "noise", "reference"), expected)
    assert torch.equal(reference.unpatchify(expected, case.latents.shape, 4), noised)


@pytest.mark.parametrize("impl", IMPLS)
def test_patch_size_one_is_the_channels_last_image(impl: str) -> None:
    case = make_case((2, 3, 5, 8), 1)
    image = case.alpha.view(-1, 1, 1, 1) * case.latents
    tokens = patchify_noise(case.latents, case.alpha, torch.zeros_like(case.sigma), 1, seed=case.seed, impl=impl)
    assert torch.equal(tokens.view(2, 5, 8, 3), image.permute(0, 2, 3, 1))


@pytest.mark.parametrize("source", ["noise", "seed"])
@pytest.mark.parametrize("latents_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_independent(latents_dtype: torch.dtype, dtype: torch.dtype, source: str) -> None:
    case = make_case((2, 4, 8, 8), 2, latents_dtype)
    case = case._replace(noise=torch.randn_like(case.noise, dtype=torch.float32))
    tokens = run(case, source, "triton", dtype=dtype)
    assert tokens.dtype == dtype
    verdict = judge(
        tokens, run(case, source, "reference", dtype=dtype), run(case.wide(), source, "reference"), factor=1.0
    )
    assert verdict.passed, verdict


def test_seed_means_the_stream_of_philox() -> None:
    case = make_case((2, 3, 4, 6), 2)
    noise = randn(case.latents.shape, case.seed)
    assert torch.equal(run(case._replace(noise=noise), "noise", "reference"), run(case, "seed", "reference"))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 8, 16)], ids=str)
def test_noise_is_independent_of_block_and_patch_size(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(shape, 1)
    expected = reference.unpatchify(run(case, "seed", "triton"), shape, 1)
    for patch_size in (2, 4, 8):
        tokens = run(case._replace(patch_size=patch_size), "seed", "triton")
        assert torch.equal(reference.unpatchify(tokens, shape, patch_size), expected)
    for block_c, block_s in ((1, 64), (2, 16), (4, 8), (4, 256)):
        monkeypatch.setattr(kernel, "tile_shape", lambda channels, tile=(block_c, block_s): tile)
        assert torch.equal(run(case._replace(patch_size=4), "seed", "triton"), reference.patchify(expected, 4))


def test_noise_is_independent_of_quads() -> None:
    """A plane of 15 pixels calls Philox per element, one of 16 per quad: the stream is the same."""
    seed = make_case((1, 1, 1, 1), 1).seed
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    streams = [
        patchify_noise(torch.zeros(1, 1, 1, width, device=DEVICE), zero, one, 1, seed=seed, impl="triton").flatten()
        for width in (15, 16)
    ]
    assert torch.equal(streams[0], streams[1][:15])


def channels_last(latents: Tensor) -> Tensor:
    return latents.contiguous(memory_format=torch.channels_last)


def sliced(latents: Tensor) -> Tensor:
    images, channels, height, width = latents.shape
    padded = torch.full((images + 1, channels + 2, height + 3, 2 * width + 1), torch.nan, device=DEVICE)
    view = padded[1:, 1:-1, 2:-1, 1::2]
    return view.copy_(latents)


def transposed(latents: Tensor) -> Tensor:
    return latents.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


@pytest.mark.parametrize("source", ["noise", "seed"])
@pytest.mark.parametrize("layout", [channels_last, sliced, transposed])
@pytest.mark.parametrize("impl", IMPLS)
def test_strides(layout: Any, source: str, impl: str) -> None:
    case = make_case((2, 3, 8, 12), 4)
    weights = torch.stack([case.alpha, case.sigma], dim=1)  # a column of it has stride 2
    strided = Case(layout(case.latents), weights[:, 0], weights[:, 1], 4, layout(case.noise), case.seed)
    assert not strided.latents.is_contiguous()
    assert torch.equal(run(strided, source, impl), run(case, source, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_deterministic_and_leaves_its_inputs_alone(impl: str, source: str) -> None:
    case = make_case((2, 3, 8, 8), 2)
    before = Case(*(value.clone() if isinstance(value, Tensor) else value for value in case))
    grad = torch.randn(2, 16, 12, device=DEVICE)
    results = []
    for _ in range(2):
        latents = case.latents.detach().requires_grad_()
        tokens = run(case._replace(latents=latents), source, impl)
        results.append((tokens, *torch.autograd.grad(tokens, latents, grad)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_no_images(impl: str, source: str) -> None:
    case = make_case((0, 3, 8, 8), 4)
    latents = case.latents.requires_grad_()
    tokens = run(case, source, impl)
    assert tokens.shape == (0, 4, 48)
    tokens.sum().backward()
    assert latents.grad is not None and latents.grad.shape == latents.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "patch_size"), SHAPES, ids=SHAPE_NAMES)
def test_formula_of_the_gradient_is_autograds(shape: Shape, patch_size: int, dtype: torch.dtype) -> None:
    """What the kernels are judged by, against autograd through the reference's forward."""
    case = make_case(shape, patch_size, dtype)
    latents = case.latents
    leaf = (latents.values if isinstance(latents, RaggedLatents) else latents).detach().requires_grad_()
    layout = latents.layout if isinstance(latents, RaggedLatents) else None
    tokens = reference.forward(leaf, case.alpha, case.sigma, None, case.seed, dtype, patch_size, layout)
    grad_tokens = torch.randn_like(tokens)
    expected = torch.autograd.grad(tokens, leaf, grad_tokens)[0]
    assert torch.equal(formula_gradient(case, grad_tokens, dtype), expected)
    assert torch.equal(gradient(case, "seed", "reference", grad_tokens), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_strided_gradients(impl: str) -> None:
    case = make_case((2, 3, 8, 8), 2)
    latents = case.latents.requires_grad_()
    tokens = run(case, "seed", impl)
    (of_sum,) = torch.autograd.grad(tokens.sum(), latents, retain_graph=True)  # all strides 0
    assert torch.equal(of_sum, case.alpha.view(-1, 1, 1, 1).expand_as(latents))
    grad = torch.randn(12, 16, 2, device=DEVICE)
    (of_transposed,) = torch.autograd.grad(tokens, latents, grad.permute(2, 1, 0), retain_graph=True)
    (of_contiguous,) = torch.autograd.grad(tokens, latents, grad.permute(2, 1, 0).contiguous())
    assert torch.equal(of_transposed, of_contiguous)


@pytest.mark.parametrize("source", ["noise", "seed"])
def test_gradcheck(source: str) -> None:
    case = make_case((2, 3, 4, 6), 2, torch.float64)

    def function(latents: Tensor) -> Tensor:
        return run(case._replace(latents=latents), source, "reference")

    assert torch.autograd.gradcheck(function, case.latents.requires_grad_())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_opcheck(impl: str, source: str) -> None:
    case = make_case((2, 3, 4, 4), 2)
    pair = (case.noise, None) if source == "noise" else (None, case.seed)
    latents = case.latents.requires_grad_()
    dense = (None, None, 3, 0)
    arguments = (latents, case.alpha, case.sigma, *pair, torch.float16, *dense, 2, impl)
    torch.library.opcheck(torch.ops.transfusion.patchify_noise.default, arguments)
    grad = torch.randn(2, 4, 12, device=DEVICE)
    backward = torch.ops.transfusion.patchify_noise_backward.default
    torch.library.opcheck(backward, (grad, case.alpha, list(latents.shape), torch.float32, *dense, 2, impl))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_graph_breaks(impl: str) -> None:
    case = make_case((2, 3, 4, 4), 2)
    latents = case.latents.requires_grad_()

    def function(latents: Tensor) -> Tensor:
        return run(case._replace(latents=latents), "seed", impl)

    tokens = torch.compile(function, fullgraph=True, backend="aot_eager")(latents)
    expected = function(latents)
    assert torch.equal(tokens, expected)
    grad = torch.randn_like(expected)
    pair = [torch.autograd.grad(result, latents, grad)[0] for result in (tokens, expected)]
    assert torch.equal(*pair)


def test_recompiles_at_most_once_over_image_counts() -> None:
    counter = CompileCounter()
    compiled = torch.compile(patchify_noise, fullgraph=True, backend=counter)
    for images in range(2, 8):
        case = make_case((images, 3, 4, 4), 2)
        compiled(*case[:4], seed=case.seed)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_raises(impl: str) -> None:
    case = make_case((1, 1, 4, 4), 2)

    def function(latents: Tensor) -> Tensor:
        return run(case._replace(latents=latents), "seed", impl)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(function, (case.latents,), (torch.ones_like(case.latents),))


@pytest.mark.parametrize("name", ["alpha", "sigma", "noise"])
def test_refuses_gradients_it_does_not_have(name: str) -> None:
    case = make_case((1, 1, 4, 4), 2)
    leaf = getattr(case, name).requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        run(case._replace(**{name: leaf}), "noise", "auto")
    with torch.no_grad():
        run(case._replace(**{name: leaf}), "noise", "auto")


ZEROS = torch.zeros
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"latents": ZEROS(3, 8, 8)}, ValueError, r"latents must be .*\(3, 8, 8\)"),
    ({"latents": ZEROS(2, 0, 8, 8)}, ValueError, "without elements"),
    ({"latents": ZEROS(2, 3, 9, 8)}, ValueError, "9x8 do not divide into patches of 4x4"),
    ({"latents": ZEROS(2, 3, 8, 6)}, ValueError, "8x6 do not divide into patches of 4x4"),
    ({"latents": ZEROS(2, 3, 8, 8, dtype=torch.int32)}, TypeError, r"latents .*torch\.int32"),
    ({"patch_size": 0}, ValueError, "patch_size=0"),
    ({"alpha": ZEROS(3)}, ValueError, r"alpha .*\(2,\), got \(3,\)"),
    ({"alpha": None}, TypeError, r"alpha must be a tensor of one float32 for each image, got NoneType"),
    ({"patch_size": 2.0}, TypeError, r"patch_size=2\.0 must be a whole number"),
    ({"dtype": "float16"}, TypeError, "dtype='float16' is not a floating-point dtype"),
    ({"alpha": 0.5}, TypeError, r"alpha must be a tensor of one float32 for each image, got float"),
    ({"seed": None, "noise": [0.0]}, TypeError, r"noise must be a tensor like the latents, got list"),
    ({"sigma": ZEROS(2, 1)}, ValueError, r"sigma .*\(2,\), got \(2, 1\)"),
    ({"alpha": ZEROS(2, dtype=torch.float16)}, TypeError, r"alpha must be float32, got torch\.float16"),
    ({"alpha": ZEROS(2, device="meta")}, ValueError, "alpha is on meta"),
    ({"seed": None}, ValueError, "one of noise= and seed=, got neither"),
    ({"noise": ZEROS(2, 3, 8, 8)}, ValueError, "one of noise= and seed=, not both"),
    ({"seed": None, "noise": ZEROS(2, 3, 8, 4)}, ValueError, r"noise has shape \(2, 3, 8, 4\)"),
    ({"seed": None, "noise": ZEROS(2, 3, 8, 8, dtype=torch.int64)}, TypeError, r"noise .*torch\.int64"),
    ({"seed": None, "noise": ZEROS(2, 3, 8, 8, device="meta")}, ValueError, "noise is on meta"),
    ({"seed": 7}, TypeError, "seed must be an int64 tensor, got int"),
    ({"seed": torch.tensor(7, dtype=torch.int32)}, TypeError, r"seed .*torch\.int32"),
    ({"seed": torch.tensor([7])}, ValueError, r"seed .*\(1,\)"),
    ({"seed": torch.empty((), dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
    ({"dtype": torch.int8}, TypeError, r"dtype=torch\.int8"),
    ({"latents": [1.0]}, TypeError, "latents must be a tensor or RaggedLatents, got list"),
    ({"impl": "sdpa"}, ValueError, "impl='sdpa' is unknown"),
    ({"impl": "triton", "dtype": torch.float64}, RuntimeError, r"dtype torch\.float64"),
    ({"impl": "triton", "latents": ZEROS(2, 3, 8, 8).double()}, RuntimeError, r"dtype torch\.float64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=[call[2] for call in BAD_CALLS])
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"latents": ZEROS(2, 3, 8, 8), "alpha": ZEROS(2), "sigma": ZEROS(2), "patch_size": 4}
    call |= {"seed": torch.tensor(7), **changes}
    with pytest.raises(error, match=message):
        patchify_noise(**call)


def test_is_registered() -> None:
    assert op.OP.cuda_order == ("triton", "reference")
    assert op.OP.order(torch.device("cpu")) == ("reference",)


def test_a_patch_size_of_any_whole_kind() -> None:
    latents, weights = torch.randn(2, 3, 8, 8), torch.ones(2)
    tokens = [patchify_noise(latents, weights, weights, size, seed=torch.tensor(7)) for size in (2, np.int64(2))]
    assert torch.equal(*tokens)
