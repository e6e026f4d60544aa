"""diffusion_loss: both implementations against the float64 gold, and the contract of the op."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from transfusion.kernels import RaggedLatents
from transfusion.kernels.diffusion_loss import op, reference
from transfusion.kernels.diffusion_loss.check import Case, eager_orders, formula_gradient, gradient, run, verdicts
from transfusion.kernels.diffusion_loss.check import make_case as draw_case
from transfusion.kernels.diffusion_loss.op import diffusion_loss
from transfusion.kernels.patchify_noise import kernel
from transfusion.kernels.patchify_noise.check import SHAPES, SOURCES, Shape, make_weights, num_images, shape_name
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.philox import randn
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import judge, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly; on a device all three run.
DTYPES = [torch.float32, torch.float16] + ([] if TRITON_INTERPRET else [torch.bfloat16])
IMPLS = ["triton", "reference"]
SHAPE_NAMES = [f"{shape_name(shape)} patch {patch_size}" for shape, patch_size in SHAPES]


def make_case(shape: Shape, patch_size: int, dtype: torch.dtype = torch.float32, weighted: bool = False) -> Case:
    input_seed = random.randrange(2**32)
    print(f"input seed {input_seed}")
    case = draw_case(shape, patch_size, dtype, DEVICE, torch.Generator().manual_seed(input_seed))
    return case if weighted else case._replace(weight=None)


def weights(images: int) -> Tensor:
    return make_weights(images, DEVICE, torch.Generator().manual_seed(random.randrange(2**32)))


@pytest.mark.parametrize(("source", "weighted"), [("noise", True), ("seed", False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "patch_size"), SHAPES, ids=SHAPE_NAMES)
def test_kernels_against_gold(
    shape: Shape, patch_size: int, dtype: torch.dtype, source: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(shape, patch_size, dtype, weighted)
    poison_empty(monkeypatch.setattr)
    found = verdicts(case, source, weights(num_images(shape)))
    assert all(verdict.passed for verdict in found.values()), found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("shape", "patch_size"), SHAPES, ids=SHAPE_NAMES)
def test_the_reference_against_gold(shape: Shape, patch_size: int, source: str) -> None:
    case = make_case(shape, patch_size, weighted=True)
    loss = run(case, source, "reference")
    assert loss.dtype == torch.float32 and loss.shape == (num_images(shape),)
    verdict = judge(loss, eager_orders(case, source), run(case.wide(), source, "reference"))
    assert verdict.passed, verdict


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "patch_size"), SHAPES, ids=SHAPE_NAMES)
def test_formula_of_the_gradient_is_autograds(shape: Shape, patch_size: int, weighted: bool) -> None:
    """What the kernels are judged by, against autograd through the reference's forward, in float64."""
    case = make_case(shape, patch_size, weighted=weighted).wide()
    prediction, latents = case.prediction.requires_grad_(), case.latents
    ragged = isinstance(latents, RaggedLatents)
    values, layout = (latents.values, latents.layout) if ragged else (latents, None)
    loss = reference.forward(prediction, values, *case[2:4], case.noise, None, case.weight, patch_size, layout)
    grad_loss = weights(num_images(shape)).double()
    expected = torch.autograd.grad(loss, prediction, grad_loss)[0]
    found = formula_gradient(case._replace(prediction=prediction.detach()), "noise", grad_loss)
    # Two roundings are ordered differently; nothing cancels in a product.
    eps = torch.finfo(torch.float64).eps
    assert ((found - expected).abs() <= 8 * eps * expected.abs()).all()


def test_reference_is_the_formula() -> None:
    """The loss is zero, exactly, at the target that patchify_noise makes with the same weights."""
    case = make_case((2, 3, 8, 8), 4).wide()
    target = patchify_noise(*case[1:5], noise=case.noise, impl="reference")
    assert torch.equal(run(case._replace(prediction=target), "noise", "reference"), torch.zeros(2).double().to(DEVICE))
    shift = torch.tensor([1.0, 2.0], device=DEVICE).double().view(2, 1, 1)
    loss = run(case._replace(prediction=target + shift), "noise", "reference")
    assert torch.allclose(loss, shift.flatten() ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_uses_the_noise_of_patchify_noise(impl: str) -> None:
    """Tokens made from the same seed and weights are the target, to the last bit."""
    case = make_case((2, 8, 16, 16), 2)
    target = patchify_noise(*case[1:5], seed=case.seed, impl=impl)
    loss = run(case._replace(prediction=target), "seed", impl)
    assert torch.equal(loss, torch.zeros_like(loss))


def test_seed_means_the_stream_of_philox() -> None:
    case = make_case((2, 3, 4, 6), 2)
    noise = randn(case.latents.shape, case.seed)
    assert torch.equal(run(case._replace(noise=noise), "noise", "reference"), run(case, "seed", "reference"))


def test_independent_of_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient bitwise, the loss within the rounding of its sums."""
    case = make_case((2, 3, 8, 8), 4)
    grad_loss = torch.randn(2, device=DEVICE)
    eager, gold = eager_orders(case, "seed"), run(case.wide(), "seed", "reference")
    expected = gradient(case, "seed", "triton", grad_loss)
    for block_c, block_s in ((1, 64), (2, 16), (4, 32), (4, 256)):
        monkeypatch.setattr(kernel, "tile_shape", lambda channels, tile=(block_c, block_s): tile)
        assert torch.equal(gradient(case, "seed", "triton", grad_loss), expected)
        verdict = judge(run(case, "seed", "triton"), eager, gold)
        assert verdict.passed, (block_c, block_s, verdict)


@pytest.mark.parametrize("impl", IMPLS)
def test_latents_and_noise_in_low_precision(impl: str) -> None:
    case = make_case((2, 4, 8, 8), 2, torch.float16)
    case = case._replace(latents=case.latents.half(), noise=case.noise.half())
    verdict = judge(run(case, "noise", impl), eager_orders(case, "noise"), run(case.wide(), "noise", "reference"))
    assert verdict.passed, verdict


@pytest.mark.parametrize("source", ["noise", "seed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl: str, source: str) -> None:
    case = make_case((2, 3, 8, 12), 4)
    columns = torch.stack([case.data_weight, case.noise_weight], dim=1)  # a column has stride 2
    padded = torch.full((3, 8, 2 * 48), torch.nan, device=DEVICE)
    strided = case._replace(
        prediction=padded[1:, 1:-1, ::2].copy_(case.prediction),
        latents=case.latents.contiguous(memory_format=torch.channels_last),
        data_weight=columns[:, 0],
        noise_weight=columns[:, 1],
        noise=case.noise.transpose(0, 3).contiguous().transpose(0, 3),
    )
    transposed = strided._replace(prediction=case.prediction.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    grad_loss = torch.randn(2, device=DEVICE)
    for other in (strided, transposed):
        assert not other.prediction.is_contiguous()
        assert torch.equal(run(other, source, impl), run(case, source, impl))
        grads = [gradient(each, source, impl, grad_loss) for each in (other, case)]
        assert torch.equal(*grads)
        assert grads[0].is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_deterministic_and_leaves_its_inputs_alone(impl: str, source: str) -> None:
    case = make_case((2, 3, 32, 32), 8)
    before = Case(*(value.clone() if isinstance(value, Tensor) else value for value in case))
    grad_loss = torch.randn(2, device=DEVICE)
    results = [(run(case, source, impl), gradient(case, source, impl, grad_loss)) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_no_images(impl: str, source: str) -> None:
    case = make_case((0, 3, 8, 8), 4)
    prediction = case.prediction.requires_grad_()
    loss = run(case, source, impl)
    assert loss.shape == (0,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert prediction.grad is not None and prediction.grad.shape == prediction.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_an_expanded_gradient(impl: str) -> None:
    """loss.sum() sends back a gradient of stride 0."""
    case = make_case((3, 2, 4, 4), 2)
    prediction = case.prediction.requires_grad_()
    (of_sum,) = torch.autograd.grad(run(case, "seed", impl).sum(), prediction)
    assert torch.equal(of_sum, gradient(case, "seed", impl, torch.ones(3, device=DEVICE)))


@pytest.mark.parametrize("source", ["noise", "seed"])
def test_gradcheck(source: str) -> None:
    case = make_case((2, 3, 4, 6), 2).wide()

    def function(prediction: Tensor) -> Tensor:
        return run(case._replace(prediction=prediction), source, "reference")

    assert torch.autograd.gradcheck(function, case.prediction.requires_grad_())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_opcheck(impl: str, source: str) -> None:
    case = make_case((2, 3, 4, 4), 2, torch.float16)
    pair = (case.noise, None) if source == "noise" else (None, case.seed)
    case.prediction.requires_grad_()
    rest = (None, None, None, 3, 0, 2, impl)
    arguments = (*case[:4], *pair, *rest)
    torch.library.opcheck(torch.ops.transfusion.diffusion_loss.default, arguments)
    backward = torch.ops.transfusion.diffusion_loss_backward.default
    grad_loss = torch.randn(2, device=DEVICE)
    torch.library.opcheck(backward, (grad_loss, case.prediction.detach(), *case[1:4], *pair, *rest))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_graph_breaks(impl: str) -> None:
    case = make_case((2, 3, 4, 4), 2)
    prediction = case.prediction.requires_grad_()

    def function(prediction: Tensor) -> Tensor:
        return run(case._replace(prediction=prediction), "seed", impl)

    loss = torch.compile(function, fullgraph=True, backend="aot_eager")(prediction)
    expected = function(prediction)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(result.sum(), prediction)[0] for result in (loss, expected)))


def test_recompiles_at_most_once_over_image_counts() -> None:
    counter = CompileCounter()
    compiled = torch.compile(diffusion_loss, fullgraph=True, backend=counter)
    for images in range(2, 8):
        case = make_case((images, 3, 4, 4), 2)
        compiled(*case[:5], seed=case.seed)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_raises(impl: str) -> None:
    case = make_case((1, 1, 4, 4), 2)

    def function(prediction: Tensor) -> Tensor:
        return run(case._replace(prediction=prediction), "seed", impl)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(function, (case.prediction,), (torch.ones_like(case.prediction),))


@pytest.mark.parametrize("name", ["latents", "data_weight", "noise_weight", "noise"])
def test_refuses_gradients_it_does_not_have(name: str) -> None:
    case = make_case((1, 1, 4, 4), 2)
    leaf = getattr(case, name).requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        run(case._replace(**{name: leaf}), "noise", "auto")
    with torch.no_grad():
        run(case._replace(**{name: leaf}), "noise", "auto")


ZEROS = torch.zeros
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prediction": ZEROS(2, 4, 47)}, ValueError, r"prediction has shape \(2, 4, 47\).* make \(2, 4, 48\)"),
    ({"prediction": ZEROS(2, 3, 8, 8)}, ValueError, r"prediction has shape \(2, 3, 8, 8\)"),
    ({"prediction": ZEROS(2, 4, 48, dtype=torch.int32)}, TypeError, r"prediction .*torch\.int32"),
    ({"prediction": ZEROS(2, 4, 48, device="meta")}, ValueError, "prediction is on meta"),
    ({"latents": ZEROS(2, 3, 64)}, ValueError, r"latents must be .*\(2, 3, 64\)"),
    ({"latents": ZEROS(2, 3, 9, 8)}, ValueError, "9x8 do not divide into patches of 4x4"),
    ({"latents": ZEROS(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, r"latents .*torch\.uint8"),
    ({"patch_size": -1}, ValueError, "patch_size=-1"),
    ({"data_weight": ZEROS(())}, ValueError, r"data_weight .*\(2,\), got \(\)"),
    ({"noise_weight": ZEROS(2).double()}, TypeError, r"noise_weight must be float32, got torch\.float64"),
    ({"noise_weight": ZEROS(2, device="meta")}, ValueError, "noise_weight is on meta"),
    ({"data_weight": None}, TypeError, "data_weight must be a tensor of one float32"),
    (
        {"latents": RaggedLatents(ZEROS(384, requires_grad=True), 3, [(8, 8)] * 2), "prediction": ZEROS(8, 48)},
        ValueError,
        r"pass latents\.with_values\(latents\.values\.detach\(\)\)",
    ),
    ({"weight": 2}, TypeError, r"weight must be a tensor .*, got int; torch\.full\(\(2,\), 2\.0\) is the same one"),
    ({"weight": ZEROS(3)}, ValueError, r"weight must have one value per image, \(2,\), got \(3,\)"),
    ({"weight": ZEROS(2, dtype=torch.float64)}, TypeError, "weight must be float32"),
    ({"seed": None}, ValueError, "one of noise= and seed=, got neither"),
    ({"noise": ZEROS(2, 3, 8, 8)}, ValueError, "one of noise= and seed=, not both"),
    ({"seed": None, "noise": ZEROS(2, 4, 48)}, ValueError, r"noise has shape \(2, 4, 48\)"),
    ({"seed": torch.tensor(7.0)}, TypeError, r"seed .*torch\.float32"),
    ({"impl": "flex"}, ValueError, "impl='flex' is unknown"),
    ({"impl": "triton", "prediction": ZEROS(2, 4, 48).double()}, RuntimeError, r"dtype torch\.float64"),
    ({"impl": "triton", "latents": ZEROS(2, 3, 8, 8).double()}, RuntimeError, r"dtype torch\.float64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=[call[2] for call in BAD_CALLS])
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"prediction": ZEROS(2, 4, 48), "latents": ZEROS(2, 3, 8, 8), "patch_size": 4}
    call |= {"data_weight": ZEROS(2), "noise_weight": ZEROS(2), "seed": torch.tensor(7), **changes}
    with pytest.raises(error, match=message):
        diffusion_loss(**call)


def test_is_registered() -> None:
    assert op.OP.cuda_order == ("triton", "reference")
    assert op.OP.order(torch.device("cpu")) == ("reference",)
