"""How an implementation is chosen: explicit requests, fallbacks and their warnings."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from transfusion.kernels import registry
from transfusion.kernels.gpus import Gpu
from transfusion.kernels.registry import Implementation, Op, choose, triton_reasons, why_not

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
CUDA = {"device": torch.device("cuda"), "dtype": torch.float32}


def never(**call: object) -> list[str]:
    return ["it is Tuesday", "it is too small"]


def float32_only(*, dtype: torch.dtype, **call: object) -> list[str]:
    return [] if dtype == torch.float32 else [f"dtype {dtype} is not float32"]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    """Of three implementations the first never runs; warnings of other tests are forgotten."""
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "STRICT", False)
    implementations = {
        "best": Implementation("no.such.module", never),
        "narrow": Implementation("math", float32_only),
        "slow": Implementation("cmath"),
    }
    return Op("an_op", implementations, cuda_order=("best", "narrow", "slow"), other_order=("narrow", "slow"))


def test_an_explicit_request_is_honoured(op: Op) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, "slow", **CUDA) == "slow"
        assert choose(op, "narrow", **CPU) == "narrow"


def test_an_explicit_request_raises_with_every_reason(op: Op) -> None:
    with pytest.raises(RuntimeError, match=r"an_op: impl='best' cannot run here: it is Tuesday; it is too small$"):
        choose(op, "best", **CPU)


def test_an_unknown_name_lists_the_known_ones(op: Op) -> None:
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of 'auto', 'best', 'narrow', 'slow'"):
        choose(op, "fast", **CPU)


def test_auto_takes_the_head_of_the_devices_order_in_silence(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STRICT", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, "auto", **CPU) == "narrow"


def test_a_fallback_warns_once_and_says_why(op: Op) -> None:
    with pytest.warns(RuntimeWarning, match=r"falling back to impl='narrow' because best: it is Tuesday"):
        assert choose(op, "auto", **CUDA) == "narrow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, "auto", **CUDA) == "narrow"
    half = {**CUDA, "dtype": torch.float16}
    with pytest.warns(RuntimeWarning, match=r"'slow' because .*; narrow: dtype torch\.float16 is not float32"):
        assert choose(op, "auto", **half) == "slow"


def test_strict_raises_where_auto_would_fall_back(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STRICT", True)
    with pytest.raises(RuntimeError, match=r"it is Tuesday.*TRANSFUSION_STRICT=1"):
        choose(op, "auto", **CUDA)
    assert choose(op, "narrow", **CUDA) == "narrow"


def test_the_variable_sets_strict() -> None:
    program = "from transfusion.kernels import registry; assert registry.STRICT"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env={"TRANSFUSION_STRICT": "1"})


def test_auto_raises_where_nothing_can_run() -> None:
    op = Op(
        "an_op", {"best": Implementation("m", never), "other": Implementation("m", never)}, ("best",), ("best", "other")
    )
    with pytest.raises(RuntimeError, match=r"no implementation can run here: best: it is Tuesday.*; other: "):
        choose(op, "auto", **CPU)


def test_backend_imports_on_first_use(op: Op) -> None:
    assert registry.backend(op, "slow").__name__ == "cmath"
    with pytest.raises(ModuleNotFoundError):
        registry.backend(op, "best")


def test_reasons_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TRITON_INSTALLED", False)
    assert any("pip install triton" in reason for reason in triton_reasons(**CUDA))
    for op in registry.OPS.values():
        call = {"head_dim": 64, "return_lse": False, **CUDA}
        assert any("pip install triton" in reason for reason in why_not(op, "triton", **call))
        with pytest.raises(RuntimeError, match="triton is not installed"):
            choose(op, "triton", **call)


@pytest.mark.parametrize("interpret", [False, True])
def test_reasons_of_device_and_dtype(interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TRITON_INTERPRET", interpret)
    monkeypatch.setattr(registry, "TRITON_INSTALLED", True)
    monkeypatch.setattr(registry, "gpu", lambda device: Gpu("sm_90", 132, True))
    assert triton_reasons(**CUDA) == []
    assert bool(triton_reasons(**CPU)) == (not interpret)
    assert triton_reasons(**{**CUDA, "dtype": torch.float64}) == [
        "dtype torch.float64 is not one of float16, bfloat16, float32"
    ]
    assert bool(triton_reasons(**{**CUDA, "dtype": torch.bfloat16})) == interpret


@pytest.mark.parametrize("finder", ["find_spec", "blocked", "missing"])
def test_what_counts_as_installed(finder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blocked", None)  # type: ignore[arg-type]
    name = {"find_spec": "json", "blocked": "blocked", "missing": "no_such_module_anywhere"}[finder]
    assert registry._installed(name) == (finder == "find_spec")


def test_forward_mode_is_refused_where_there_is_a_tangent() -> None:
    registry.refuse_forward_mode("an_op", torch.ones(2), None)

    def guarded(x: Tensor) -> Tensor:
        registry.refuse_forward_mode("an_op", None, x)
        return x

    with pytest.raises(NotImplementedError, match="an_op has no forward-mode derivative"):
        torch.func.jvp(guarded, (torch.ones(2),), (torch.ones(2),))
