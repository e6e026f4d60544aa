"""doctor: the report names what runs here and why the rest does not."""

import importlib.metadata

import pytest
import torch

from transfusion.doctor import report
from transfusion.kernels import registry


def lines_under(title: str) -> list[str]:
    (section,) = (section for section in report().split("\n\n") if section.startswith(title))
    return [line.strip() for line in section.splitlines()[1:]]


def test_versions_and_devices() -> None:
    text = report()
    assert f"torch {torch.__version__}" in text
    assert "cpu: " in text
    assert text.count("\ncuda:") == 0 and ("cuda:0" in text) == torch.cuda.is_available()


def test_a_missing_distribution_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_diffusers(name: str) -> str:
        if name == "diffusers":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_diffusers)
    assert "diffusers: not installed" in lines_under("Versions")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFUSION_STRICT", "1")
    assert any(line.startswith("TRANSFUSION_STRICT=1 ") for line in lines_under("Environment"))


def test_every_op_and_implementation_is_listed_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TRITON_INTERPRET", False)
    lines = lines_under("Ops on cpu")
    assert len(lines) == sum(1 + len(op.implementations) for op in registry.OPS.values())
    assert "transfusion_attention: auto takes sdpa (torch.float32)" in lines
    assert "patchify_noise: auto takes reference (torch.float32)" in lines
    refused = [line for line in lines if line.startswith("triton: ")]
    assert len(refused) == len(registry.OPS)
    assert all("'cpu'" in line for line in refused)


def test_a_fallback_is_told_without_spending_its_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry, "TRITON_INSTALLED", False)
    monkeypatch.setattr(registry, "STRICT", False)
    warned = set(registry._warned)
    assert "patchify_noise: auto falls back from triton to reference (torch.bfloat16)" in lines_under("Ops on cuda")
    monkeypatch.setattr(registry, "STRICT", True)
    assert any("auto raises under TRANSFUSION_STRICT=1" in line for line in lines_under("Ops on cuda"))
    assert registry._warned == warned
