"""What goes on beside a warp: copies and products in flight, and the barriers in shared memory that tell of them.

An event may happen at any time between its issue and the wait for it: the machine chooses, from its seed.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ptx_machine.memory import Fault, SharedMemory


class Events:
    """What was issued and has not happened; those of one `line` happen in the order of their issue.

    Of a third of the programs all happen at once, of a third as late as can be, of a third at any time: `early` is the
    chance that one happens when it is issued, `between` that one does before the next warp goes on.
    """

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator
        self.early, self.between = generator.choice([(1.0, 0.0), (0.0, 0.0), (0.3, 0.1)])
        self.lines: dict[Any, list[Callable[[], None]]] = {}

    def issue(self, line: Any, happen: Callable[[], None]) -> None:
        self.lines.setdefault(line, []).append(happen)
        if self.generator.random() < self.early:
            self.happen(line)

    def happen(self, line: Any, left: int = 0) -> None:
        """All events of a line but the last `left`."""
        events = self.lines.get(line, [])
        while len(events) > left:
            events.pop(0)()
        if not events:
            self.lines.pop(line, None)

    def happen_one(self, line: Any) -> None:
        self.happen(line, len(self.lines[line]) - 1)


class Groups:
    """Committed groups of one warp's events on one line: how many events each has."""

    def __init__(self, events: Events, line: Any) -> None:
        self.events, self.line = events, line
        self.open = 0
        self.sizes: list[int] = []

    def issue(self, happen: Callable[[], None]) -> None:
        self.open += 1
        self.events.issue(self.line, happen)

    def commit(self) -> None:
        self.sizes.append(self.open)
        self.open = 0

    def wait(self, allowed: int) -> None:
        """Until at most `allowed` groups, the newest, are in flight."""
        self.sizes = self.sizes[max(len(self.sizes) - allowed, 0) :]
        self.events.happen(self.line, sum(self.sizes) + self.open)


class Barrier:
    """An mbarrier: a phase is complete when all that is expected has arrived, threads and bytes."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0
        self.fenced = False  # since it was made: copies signal what the asynchronous proxy sees

    def arrive(self, expected: int) -> None:
        if self.pending == 0:
            raise Fault("more arrivals at an mbarrier than it was made for")
        self.bytes += expected
        self.pending -= 1
        self._end()

    def complete(self, octets: int) -> None:
        if not self.fenced:
            raise Fault("a copy signals an mbarrier, and no fence.proxy.async came after its init")
        self.bytes -= octets
        self._end()

    def _end(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase ^= 1

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity is complete."""
        return self.phase != parity


class TensorMap(NamedTuple):
    """What the tensor memory accelerator knows of a tensor, dimensions from the outermost on."""

    tensor: Any
    box: tuple[int, ...]
    swizzle: int

    @classmethod
    def of(cls, descriptor: Any, metadata: dict[str, Any]) -> "TensorMap":
        """From a host's descriptor and what the compiler says of it."""
        base, strides = descriptor.base, list(descriptor.strides)
        if base.data_ptr() % 16 or any(stride * base.element_size() % 16 for stride in strides[:-1]):
            raise Fault(f"a tensor map of address {base.data_ptr():#x} and strides {strides}")
        if strides[-1] != 1 or any(not 0 < stride < 2**40 // base.element_size() for stride in strides[:-1]):
            raise Fault(f"a tensor map of strides {strides}")
        if not all(0 < size <= 2**32 for size in descriptor.shape) or not all(n <= 256 for n in metadata["block_size"]):
            raise Fault(f"a tensor map of shape {descriptor.shape} in boxes {metadata['block_size']}")
        octets = {2: torch.int16, 4: torch.int32}[base.element_size()]
        tensor = torch.as_strided(base, list(descriptor.shape), strides).view(octets)
        swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[metadata["swizzle"]]
        box = tuple(metadata["block_size"])
        if swizzle and box[-1] * base.element_size() > swizzle:
            raise Fault(f"boxes {box} of rows longer than their swizzle of {swizzle} bytes")
        return cls(tensor.numpy(), box, swizzle)

    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.tensor.itemsize

    def copy(self, shared: SharedMemory, to: int, index: tuple[int, ...]) -> None:
        """The box at `index` to shared memory; elements beyond the tensor are 0."""
        if to % (128 if self.swizzle else 16):
            raise Fault(f"a tensor copy to {to:#x}")
        block = np.zeros(self.box, self.tensor.dtype)
        spans = [
            (max(0, -first), max(0, min(length, size - first)))
            for first, length, size in zip(index, self.box, self.tensor.shape, strict=True)
        ]
        if all(low < high for low, high in spans):
            inside = tuple(slice(low, high) for low, high in spans)
            source = tuple(slice(first + low, first + high) for first, (low, high) in zip(index, spans, strict=True))
            block[inside] = self.tensor[source]
        address = to + np.arange(self.bytes())
        if self.swizzle:
            address = address ^ ((address >> 7 & (self.swizzle // 16 - 1)) << 4)
        shared.write_by_proxy(address - shared.BASE, block.view(np.uint8).ravel())
