"""The machine in the place of Triton's CUDA driver: launches compile for sm_90, and what was compiled is executed."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

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


def _load(compiled: CompiledKernel) -> None:
    """In the place of loading a binary: whichever way leads to a launch, it comes to the device that is entered."""
    compiled.module = compiled.function = compiled
    compiled._run = lambda *call: Device.entered.launch(*call)


class Device:
    """Launches of Triton and Gluon kernels on CPU tensors run on the machine while this context is entered.

    seed: of the order of warps and events. together: not each warp on its own, see program.py.
    `edit` may change PTX before it is executed; `launched`: kernels' names, in order.
    """

    entered: ClassVar["Device"]

    def __init__(self, seed: int, capability: int = 90, together: bool = True) -> None:
        self.seed, self.capability, self.together = seed, capability, together
        self.edit: Callable[[str, str], str] = lambda name, ptx: ptx
        self.launched: list[str] = []
        self.kernels: dict[int, Kernel] = {}
        self.compiled: list[CompiledKernel] = []  # kept, for their ids

    def __enter__(self) -> "Device":
        self.before = triton.runtime.driver._active, CompiledKernel._init_handles
        triton.runtime.driver.set_active(_Driver(self.capability))
        CompiledKernel._init_handles = _load
        Device.entered = self
        return self

    def __exit__(self, *error: object) -> None:
        triton.runtime.driver._active, CompiledKernel._init_handles = self.before

    def launch(self, *call: Any) -> None:
        """Executes what was compiled: call is the grid, stream, what was compiled, four things more, arguments."""
        grid, compiled, arguments = call[:3], call[4], call[9:]
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        flat: list[Any] = []
        tensors: list[torch.Tensor] = []
        for value, kind in zip(arguments, compiled.src.signature.values(), strict=True):
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
        name = compiled.src.fn.__name__
        kernel = self.kernels.get(id(compiled))
        if kernel is None:
            kernel = Kernel(parse(self.edit(name, compiled.asm["ptx"])), self.together)
            self.compiled.append(compiled)
            self.kernels[id(compiled)] = kernel
        flat += [0] * (len(kernel.program.parameters) - len(flat))  # scratch memory, of which there is none
        assert compiled.metadata.global_scratch_size == 0
        assert compiled.metadata.shared <= SHARED_BYTES[self.capability]
        self.launched.append(name)
        kernel.launch(grid, flat, GlobalMemory(tensors), compiled.metadata.shared, self.seed)
