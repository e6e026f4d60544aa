"""The machine in the place of Triton's CUDA driver: launches compile for sm_90, and what was compiled is executed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ptx_machine.assembly import parse
from ptx_machine.asynchronous import TensorMap
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Kernel

SHARED_BYTES = {90: 227 * 1024, 80: 163 * 1024}


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = SHARED_BYTES[self.capability]
        return {"max_shared_mem": shared, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Device:
    """Launches of Triton and Gluon kernels on CPU tensors run on the machine while this context is entered.

    seed: of the order of warps and events. together: not each warp on its own, see program.py.
    `edit` may change PTX before it is executed; `launched`: kernels' names, in order.
    """

    def __init__(self, seed: int, capability: int = 90, together: bool = True) -> None:
        self.seed, self.capability, self.together = seed, capability, together
        self.edit: Callable[[str, str], str] = lambda name, ptx: ptx
        self.launched: list[str] = []
        self.kernels: dict[int, Kernel] = {}
        self.compiled: list[Any] = []  # kept, for their ids

    def __enter__(self) -> "Device":
        self.before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver(self.capability))
        self.run = JITFunction.run
        device = self

        def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = device.run(function, *args, grid=grid, warmup=True, **options)
            device.launch(function, compiled, args, options, grid)
            return compiled

        JITFunction.run = run
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self.run
        triton.runtime.driver._active = self.before

    def launch(self, function: Any, compiled: Any, args: Any, options: dict[str, Any], grid: Any) -> None:
        """Executes what was compiled."""
        bound, specialization, _ = function.device_caches[self.capability][4](*args, **options)
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        flat: list[Any] = []
        tensors: list[torch.Tensor] = []
        for value, (kind, *_) in zip(bound.values(), specialization, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                flat.append(value.data_ptr())
            elif hasattr(value, "base"):
                flat += [TensorMap.of(value, next(maps)), *map(int, value.shape), *map(int, value.strides)]
            elif kind == "fp32":
                flat.append(int(np.float32(value).view(np.uint32)))
            else:
                flat.append(int(value))
        kernel = self.kernels.get(id(compiled))
        if kernel is None:
            ptx = self.edit(function.__name__, compiled.asm["ptx"])
            kernel = Kernel(parse(ptx), self.together)
            self.compiled.append(compiled)
            self.kernels[id(compiled)] = kernel
        shape = tuple(grid(bound) if callable(grid) else grid)
        flat += [0] * (len(kernel.program.parameters) - len(flat))  # scratch memory, of which there is none
        assert compiled.metadata.global_scratch_size == 0
        self.launched.append(function.__name__)
        memory = GlobalMemory(tensors)
        kernel.launch((*shape, 1, 1)[:3], flat, memory, compiled.metadata.shared, self.seed)
