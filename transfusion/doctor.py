"""Versions, devices, and for every op the path that `auto` takes here and why each other one is refused."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

import transfusion.kernels  # noqa: F401 - registers every op
from transfusion.kernels import registry

# The distributions that decide what runs; a missing one is reported, not raised.
DISTRIBUTIONS = ("transfusion-kernels", "triton", "diffusers", "tokenizers", "numpy")
VARIABLES = {
    "TRITON_INTERPRET": "1 runs Triton kernels in Python, without a GPU (read at import)",
    "TRANSFUSION_STRICT": "1 makes auto raise where it would fall back (read at import)",
    "TRITON_DEFAULT_FP_FUSION": "0 keeps Triton from fusing multiply and add",
    "CUDA_VISIBLE_DEVICES": "which GPUs this process sees",
    "OMP_NUM_THREADS": "CPU threads of torch",
}
# A typical call on each device, for any op: an op takes from it what its choice depends on.
_CALL = {"head_dim": 64, "return_lse": False, "needs_grad": False}


def report() -> str:
    """The whole report as text, one fact a line; starts no kernel."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Environment": _environment(),
        **{f"Ops on {device}": _ops(device) for device in _device_types()},
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"torch {torch.__version__}"  # names the CUDA it was built for, which the distribution's version does not
    for name in DISTRIBUTIONS:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices() -> Iterator[str]:
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield f"cuda:{index}: {properties.name}, capability {properties.major}.{properties.minor}, {memory:.1f} GiB"
    if not torch.cuda.is_available():
        yield f"cuda: not available (this torch is built for CUDA {torch.version.cuda}, HIP {torch.version.hip})"


def _environment() -> Iterator[str]:
    for name, meaning in VARIABLES.items():
        yield f"{name}={os.environ.get(name, '')}  ({meaning})"


def _ops(device_type: str) -> Iterator[str]:
    """For each op: what `auto` does, then every implementation with its reasons to refuse."""
    device = torch.device(device_type)
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    for op in registry.OPS.values():
        yield f"{op.name}: {_auto(op, device, dtype)} ({dtype})"
        for name in op.implementations:
            reasons = registry.why_not(op, name, device=device, dtype=dtype, **_CALL)
            yield f"  {name}: " + ("; ".join(reasons) or "can run")


def _auto(op: registry.Op, device: torch.device, dtype: torch.dtype) -> str:
    """What `registry.choose` would decide, without its warning, which is given only once in a process."""
    order = op.order(device)
    able = [name for name in order if not registry.why_not(op, name, device=device, dtype=dtype, **_CALL)]
    if not able:
        return "auto raises: nothing can run"
    if able[0] == order[0]:
        return f"auto takes {able[0]}"
    fallback = f"falls back from {order[0]} to {able[0]}"
    return f"auto raises under TRANSFUSION_STRICT=1, it {fallback} otherwise" if registry.STRICT else f"auto {fallback}"
