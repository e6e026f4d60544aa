"""denoise_step: both implementations against the float64 gold, and the contract of the op."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.kernels.denoise_step import op
from transfusion.kernels.denoise_step.check import KINDS, Case, run, verdicts
from transfusion.kernels.denoise_step.check import make_case as draw_case
from transfusion.kernels.denoise_step.op import denoise_step
from transfusion.kernels.patchify_noise.check import SHAPES, Shape, shape_name
from transfusion.kernels.patchify_noise.reference import patchify
from transfusion.kernels.philox import randn
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([] if TRITON_INTERPRET else [torch.bfloat16])
IMPLS = ["triton", "reference"]


def make_case(kind: str, shape: Shape = (2, 3, 8, 12), patch_size: int = 2, dtype: Any = torch.float32) -> Case:
    input_seed = random.randrange(2**32)
    print(f"input seed {input_seed}")
    return draw_case(kind, shape, patch_size, dtype, DEVICE, torch.Generator().manual_seed(input_seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "patch_size"), SHAPES, ids=[f"{shape_name(s)} patch {p}" for s, p in SHAPES])
def test_kernel_against_gold(
    shape: Shape, patch_size: int, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(kind, shape, patch_size, dtype)
    poison_empty(monkeypatch.setattr)
    found = verdicts(case)
    assert all(verdict.passed for verdict in found.values()), found


def test_reference_is_the_formula() -> None:
    case = make_case("noise").wide()
    a, b, d, c, p, q, limit = case.coefficients.double().tolist()
    x, z, weight = case.latents, case.options["noise"], case.options["guidance"].double().view(-1, 1, 1)
    tokens = case.options["unconditional"] + weight * (case.prediction - case.options["unconditional"])
    x, z = patchify(x, 2), patchify(z, 2)
    expected = a * x + b * tokens + d * (p * x + q * tokens).clamp(-limit, limit) + c * z
    assert torch.equal(patchify(run(case, "reference"), 2), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_seed_is_the_stream_of_philox(impl: str) -> None:
    case = make_case("seed")
    noise = randn(case.latents.shape, case.options["seed"])
    given = {name: value for name, value in case.options.items() if name != "seed"} | {"noise": noise}
    one, other = run(case, impl), run(case._replace(options=given), impl)
    assert torch.equal(one, other) if impl == "reference" else torch.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_guidance_of_one_is_the_prediction(impl: str) -> None:
    """Up to the rounding of u + (v - u)."""
    case = make_case("noise")
    case = case._replace(options=case.options | {"guidance": torch.ones(2, device=DEVICE)})
    plain = case._replace(options={"noise": case.options["noise"]})
    eps = torch.finfo(torch.float32).eps
    assert (run(case, impl) - run(plain, impl)).abs().max() <= 16 * eps * (1 + case.prediction.abs().max())


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_determinism(impl: str) -> None:
    case = make_case("noise")
    latents = torch.empty(3, 5, 8, 24, device=DEVICE)[1:, 1:4, :, ::2].copy_(case.latents)
    prediction = case.prediction.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = case._replace(latents=latents, prediction=prediction)
    before = [t.clone() for t in (*case[:3], *case.options.values())]
    assert torch.equal(run(strided, impl), run(case, impl)) and torch.equal(run(case, impl), run(case, impl))
    assert run(strided, impl).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, (*case[:3], *case.options.values()), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_handed_on(impl: str) -> None:
    case = make_case("noise")
    prediction = case.prediction.clone()
    prediction[1, 2, 3] = math.nan
    assert run(case._replace(prediction=prediction), impl).isnan().sum() == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_no_images(impl: str) -> None:
    assert run(make_case("seed", (0, 3, 8, 8), 4), impl).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, impl: str) -> None:
    case = make_case(kind, (2, 3, 4, 4))
    given = [case.options.get(name) for name in ("unconditional", "guidance", "noise", "seed")]
    arguments = (*case[:3], *given, None, None, 3, 0, 2, impl)
    torch.library.opcheck(torch.ops.transfusion.denoise_step.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    case = make_case("seed")
    compiled = torch.compile(lambda x: run(case._replace(latents=x), "auto"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.latents), run(case, "auto"))


ZEROS = torch.zeros
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prediction": ZEROS(2, 4, 47)}, ValueError, r"prediction has shape \(2, 4, 47\).* make \(2, 4, 48\)"),
    ({"unconditional": ZEROS(2, 4, 48)}, ValueError, "guidance and unconditional belong together"),
    ({"guidance": ZEROS(2)}, ValueError, "guidance and unconditional belong together"),
    ({"guidance": ZEROS(2), "unconditional": ZEROS(1, 4, 48)}, ValueError, r"unconditional has shape \(1, 4, 48\)"),
    ({"guidance": ZEROS(1), "unconditional": ZEROS(2, 4, 48)}, ValueError, r"guidance .*\(2,\), got \(1,\)"),
    ({"prediction": None}, TypeError, r"prediction must be a tensor of patches, got NoneType"),
    ({"coefficients": [0.0] * 7}, TypeError, r"coefficients must be a tensor \(7,\) of float32, got list"),
    ({"coefficients": ZEROS(6)}, ValueError, r"coefficients must have shape \(7,\), got \(6,\)"),
    ({"coefficients": ZEROS(7).double()}, TypeError, "coefficients must be float32"),
    ({"coefficients": ZEROS(7, device="meta")}, ValueError, "coefficients is on meta"),
    ({"noise": ZEROS(2, 3, 8, 8), "seed": torch.tensor(1)}, ValueError, "one of noise= and seed=, not both"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, r"seed .*torch\.int32"),
    ({"latents": ZEROS(2, 3, 9, 8)}, ValueError, "9x8 do not divide"),
    ({"prediction": ZEROS(2, 4, 48, requires_grad=True)}, ValueError, "prediction requires grad"),
    ({"impl": "sdpa"}, ValueError, "impl='sdpa' is unknown"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=[call[2] for call in BAD_CALLS])
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"prediction": ZEROS(2, 4, 48), "latents": ZEROS(2, 3, 8, 8), "patch_size": 4}
    call |= {"coefficients": ZEROS(7), **changes}
    with pytest.raises(error, match=message):
        denoise_step(**call)


def test_is_registered() -> None:
    assert op.OP.cuda_order == ("triton", "reference")
    assert op.OP.order(torch.device("cpu")) == ("reference",)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_one_cuda_graph_serves_every_step() -> None:
    """Coefficients and seed are read on the device: a replay after they changed is the step they now say."""
    case = make_case("seed")

    def step() -> Tensor:
        return run(case, "triton")

    step()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        case.coefficients.copy_(torch.randn_like(case.coefficients).abs())
        case.options["seed"].add_(1)
        graph.replay()
        assert torch.equal(captured, step())
