"""`choose(op, impl, ...)` -> the implementation that runs, or an error that says why it cannot.

An op is one equation with several implementations. Each implementation states the reasons why it
cannot take a given call; `choose` honours an explicit request or raises with every reason, and for
`impl="auto"` takes the first implementation of the device's order that has none. Leaving the head
of that order is a fallback: it warns once, and raises when `TRANSFUSION_STRICT=1`.

This module imports neither triton nor a backend; backends load on first use.
"""

import importlib
import importlib.util
import operator
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.gpus import gpu


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked by `sys.modules[name] = None`
        return False


# Read once: triton itself reads the variable when it is imported, and a compiled graph must see constants.
TRITON_INSTALLED = _installed("triton")
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
STRICT = os.environ.get("TRANSFUSION_STRICT", "0") == "1"

Reasons = Callable[..., list[str]]


def no_reasons(**call: Any) -> list[str]:
    """-> `[]`: the implementation takes every call."""
    return []


def triton_reasons(*, device: torch.device, dtype: torch.dtype, **call: Any) -> list[str]:
    """Why no Triton kernel can run for tensors of `dtype` on `device` in this process."""
    reasons = []
    if not TRITON_INSTALLED:
        reasons.append("triton is not installed (pip install triton)")
    if device.type != "cuda" and not TRITON_INTERPRET:
        reasons.append(f"tensors are on {device.type!r}, and TRITON_INTERPRET=1 was not set before the import")
    if device.type == "cuda" and not TRITON_INTERPRET and _is_too_old(device):
        reasons.append(f"{gpu(device).architecture} is older than sm_80, whose instructions the kernels are made of")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {dtype} is not one of float16, bfloat16, float32")
    if TRITON_INTERPRET and dtype == torch.bfloat16:
        reasons.append("the Triton interpreter computes bfloat16 wrongly")
    return reasons


def _is_too_old(device: torch.device) -> bool:
    """Whether the GPU lacks the kernels' instructions. False where there is none, as for fake tensors."""
    try:
        return not gpu(device).has_kernels
    except (AssertionError, RuntimeError):
        return False


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: the module that holds it, and the reasons why it cannot take a call."""

    module: str
    reasons: Reasons = no_reasons


@dataclass(frozen=True)
class Op:
    """An equation's name, its implementations, and the order in which `auto` tries them, on CUDA and elsewhere."""

    name: str
    implementations: dict[str, Implementation]
    cuda_order: tuple[str, ...]
    other_order: tuple[str, ...]

    def order(self, device: torch.device) -> tuple[str, ...]:
        """The names that `auto` tries on `device`, best first."""
        return self.cuda_order if device.type == "cuda" else self.other_order


OPS: dict[str, Op] = {}
_warned: set[tuple[str, str]] = set()


def register(op: Op) -> Op:
    """Adds `op` to `OPS`, which `doctor` lists."""
    OPS[op.name] = op
    return op


def why_not(op: Op, impl: str, **call: Any) -> list[str]:
    """Every reason why `impl` cannot take the call; empty when it can."""
    return op.implementations[impl].reasons(**call)


def choose(op: Op, impl: str, **call: Any) -> str:
    """-> the name of the implementation that takes the call.

    `call` holds what the choice depends on, at least `device` and `dtype`. Raises `ValueError` for an
    unknown name and `RuntimeError` where an explicit request, or under `TRANSFUSION_STRICT=1` the best
    implementation of this device, cannot be honoured.
    """
    if impl == "auto":
        return _choose_auto(op, **call)
    if not isinstance(impl, str) or impl not in op.implementations:
        names = ", ".join(repr(name) for name in ("auto", *op.implementations))
        raise ValueError(f"{op.name}: impl={impl!r} is unknown; choose one of {names}")
    reasons = why_not(op, impl, **call)
    if reasons:
        raise RuntimeError(f"{op.name}: impl={impl!r} cannot run here: " + "; ".join(reasons))
    return impl


def _choose_auto(op: Op, **call: Any) -> str:
    order = op.order(call["device"])
    refused: list[str] = []
    for name in order:
        reasons = why_not(op, name, **call)
        if not reasons:
            if refused:
                _report_fallback(op, name, refused)
            return name
        refused.append(f"{name}: " + ", ".join(reasons))
    raise RuntimeError(f"{op.name}: no implementation can run here: " + "; ".join(refused))


def _report_fallback(op: Op, name: str, refused: list[str]) -> None:
    message = f"{op.name}: falling back to impl={name!r} because " + "; ".join(refused)
    if STRICT:
        raise RuntimeError(f"{message} (TRANSFUSION_STRICT=1)")
    if not torch.compiler.is_compiling() and (op.name, message) not in _warned:
        _warned.add((op.name, message))
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def backend(op: Op, impl: str) -> ModuleType:
    """The module that holds `impl` of `op`, imported on first use."""
    return importlib.import_module(op.implementations[impl].module)


def check_tensor(name: str, value: object, wanted: str = "") -> None:
    """Raises `TypeError` unless `value` is a tensor; `wanted` says of what kind, in words without sizes, so that it
    fits a graph of any size."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a tensor{wanted}, got {kind}; make one with torch.as_tensor(...)")


def whole(name: str, given: Any, least: int | None = None) -> int:
    """`given` as an int; a graph's symbolic size is left as it is, since `operator.index` would fix it.

    Raises `TypeError` for what is no whole number, `ValueError` for one below `least`.
    """
    if not isinstance(given, (int, torch.SymInt)):
        try:
            given = operator.index(given)
        except TypeError:
            raise TypeError(f"{name}={given!r} must be a whole number, got {type(given).__name__}") from None
    if least is not None and given < least:
        raise ValueError(f"{name}={given} must be at least {least}")
    return given


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raises `NotImplementedError` where a tensor carries a forward-mode tangent.

    torch drops the tangent of a custom op silently (zeros), so the op must look for it itself.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative: torch.func.jvp and dual tensors cannot pass through it; "
                "use reverse mode (backward, torch.autograd.grad)"
            )
