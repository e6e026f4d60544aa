"""`python played_gpu.py [options of python -m benchmarks]`: the benchmarks as on a GPU, which the CPU plays.

"cuda" means "cpu" to every function of torch, torch.cuda answers for an H200, torch.compile compiles nothing, and
Triton's kernels run in its interpreter, in float16. One case of each kind is kept, under the name it has on a GPU, and
made small; the figures mean nothing.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import conftest  # noqa: F401  (makes `benchmarks` importable)
import torch
from torch.overrides import TorchFunctionMode

_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", total_memory=141 << 30, L2_cache_size=1 << 10, multi_processor_count=132, major=9, minor=0
)


def _played(argument: Any) -> Any:
    """`argument`, and "cpu" for what names a GPU."""
    is_gpu = isinstance(argument, str | torch.device) and str(argument).partition(":")[0] == "cuda"
    return "cpu" if is_gpu else argument


class _OnCPU(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "pin_memory":
            return args[0]
        return function(*map(_played, args), **{name: _played(value) for name, value in (kwargs or {}).items()})


class _Event:
    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return (later.time - self.time) * 1e3


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(_played(device_type), *args, **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return torch._C.Generator(_played(device))


def play() -> None:
    """From now on this process has a GPU."""
    for name, answer in {
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "get_device_name": _PROPERTIES.name,
        "get_device_properties": _PROPERTIES,
        "get_device_capability": (9, 0),
        "memory_allocated": 0,
        "max_memory_allocated": 1 << 20,
        **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache", "_sleep")),
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Event, torch.autocast, torch.Generator = _Event, _Autocast, _Generator  # type: ignore[misc, assignment]
    torch.compile = lambda function=None, **_: function  # type: ignore[assignment]
    _OnCPU().__enter__()


def shrink() -> None:
    """One small case of each kind, under its own name, and no ceiling to measure."""
    from benchmarks import cases, clock

    cases.DTYPE = torch.float16  # the interpreter computes bfloat16 wrongly
    clock.copy_bandwidth = clock.matmul_rate = lambda: 1e12  # type: ignore[assignment]
    kept = {(case.group, case.queries > 1): name for name, case in reversed(cases.ATTENTION.items())}
    for name, case in list(cases.ATTENTION.items()):
        del cases.ATTENTION[name]
        if name in kept.values():
            queries = min(case.queries, 40)
            keys = 80 if case.layout == "continuation" else queries
            heads, grouped = 2, 2 if case.heads == case.kv_heads else 1
            small = {"batch": 1, "head_dim": 16, "image_tokens": min(case.image_tokens, 8)}
            cases.ATTENTION[name] = replace(case, queries=queries, keys=keys, heads=heads, kv_heads=grouped, **small)
    first, *others = list(cases.IMAGES)
    cases.IMAGES[first] = (2, 4, 4, 6, 2)
    for name in others:
        del cases.IMAGES[name]

    from benchmarks import denoise, generation, train

    for name in list(train.CASES):
        train.CASES[name] = train.TrainCase("tiny", 1, 64, 8)
    for name in list(denoise.CASES):
        denoise.CASES[name] = denoise.DenoiseCase("tiny", 1, 8)
    generation._SIZES["cuda"] = generation.Sizes(64, 2, 2, torch.float16)
    generation._PREFIX = 64


if __name__ == "__main__":
    play()
    shrink()
    from benchmarks import __main__ as command

    sys.exit(command.main())
