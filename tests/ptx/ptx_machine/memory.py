"""Bytes that lanes load and store: the tensors of a launch, and a program's shared memory. Nothing beyond them."""

import bisect
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Fault(Exception):
    """The kernel did what a GPU would not let it, or what would give any result."""


def _words(octets: Any, bits: int) -> Any:
    return octets[: octets.size // (bits // 8) * (bits // 8)].view(f"u{bits // 8}")


class Memory:
    """A run of bytes: `load` and `store` of each lane's `count` neighbours of `bits` bits at offsets from its begin."""

    def __init__(self, octets: Any) -> None:
        self.octets = octets
        self.views = {bits: _words(octets, bits) for bits in (8, 16, 32, 64)}

    def load(self, offset: Any, count: int, bits: int) -> Any:
        """(count, lanes)"""
        index = offset // (bits // 8)
        view = self.views[bits]
        return view[index][None] if count == 1 else view[index + np.arange(count)[:, None]]

    def store(self, offset: Any, values: Any, bits: int, mask: Any) -> None:
        index = offset // (bits // 8)
        if mask is not None:
            index = index[mask]
        view = self.views[bits]
        for place, value in enumerate(values):
            value = np.broadcast_to(value, offset.shape)
            view[index + place] = value if mask is None else value[mask]


class GlobalMemory:
    """The tensors that a launch was given, at their addresses. A lane may touch bytes between a tensor's first and last
    element, nothing else."""

    def __init__(self, tensors: list[Tensor]) -> None:
        regions: dict[int, tuple[int, int, Memory]] = {}
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            low = sum(min(0, (size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            high = sum(max(0, (size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr() + low * tensor.element_size()
            end = tensor.data_ptr() + (high + 1) * tensor.element_size()
            known = regions.get(begin)
            if known is None or known[1] < end:
                regions[begin] = (begin, end, Memory(_bytes(tensor, low, high)))
        self.regions = [regions[begin] for begin in sorted(regions)]
        self.begins = [region[0] for region in self.regions]

    def find(self, address: int, size: int) -> tuple[int, int, Memory]:
        """The region that holds `size` bytes at `address`."""
        for index in range(bisect.bisect_right(self.begins, address) - 1, -1, -1):
            if address + size <= self.regions[index][1]:
                return self.regions[index]
        where = [f"{begin:#x}..{end:#x}" for begin, end, _ in self.regions]
        raise Fault(f"{size} bytes of global memory at {address:#x} belong to no tensor; there are {where}")

    def split(self, address: Any, size: int, mask: Any) -> Any:
        """(region, offsets from its begin, the lanes that touch it) for each region; most often there is one."""
        touched = address if mask is None else address[mask]
        if (touched % np.uint64(size)).any():
            raise Fault(f"global memory: {touched} not multiples of {size} bytes")
        left = np.ones(address.shape, bool) if mask is None else mask.copy()
        while left.any():
            begin, end, memory = self.find(int(address[left.argmax()]), size)
            here = left & (address >= np.uint64(begin)) & (address <= np.uint64(end - size))
            yield memory, np.where(here, address - np.uint64(begin), np.uint64(0)).astype(np.int64), here
            left &= ~here

    def load(self, address: Any, count: int, bits: int, mask: Any) -> Any:
        """What lanes not in the mask get is anything: ones."""
        result = None
        for memory, offset, here in self.split(address, count * bits // 8, mask):
            part = memory.load(offset, count, bits)
            if here.all():
                return part
            result = np.where(here, part, ~np.zeros_like(part) if result is None else result)
        return np.full((count, address.size), -1, np.int64).astype(f"u{bits // 8}") if result is None else result

    def store(self, address: Any, values: Any, bits: int, mask: Any) -> None:
        for memory, offset, here in self.split(address, len(values) * bits // 8, mask):
            memory.store(offset, values, bits, here)


def _bytes(tensor: Tensor, low: int, high: int) -> Any:
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    size = tensor.element_size()
    first = (tensor.storage_offset() + low) * size
    return storage.numpy()[first : first + (high - low + 1) * size]


class SharedMemory(Memory):
    """A program's own, full of ones at first (NaN, -1). Bytes that ordinary stores wrote must be fenced before the
    asynchronous proxy (wgmma, tensor copies) reads them. Of what cp.async wrote that is not asked: Triton 3.6 fences
    none of it, 3.7 most (its pull request 9610)."""

    BASE = 1024

    def __init__(self, size: int) -> None:
        super().__init__(np.full(-(-size // 16) * 16, 255, np.uint8))
        self.size = size
        self.unfenced = np.zeros(self.octets.size // 4 + 1, bool)

    def offsets(self, address: Any, size: int, mask: Any) -> Any:
        """Offsets of each lane; those not in the mask are 0."""
        offset = address.astype(np.int64) - self.BASE
        inside = offset if mask is None else offset[mask]
        if inside.size and (inside.min() < 0 or inside.max() + size > self.size or (inside % size).any()):
            raise Fault(f"shared memory: {size} bytes at {inside}, there are {self.size}")
        return offset if mask is None else np.where(mask, offset, 0)

    def load_at(self, address: Any, count: int, bits: int, mask: Any) -> Any:
        return self.load(self.offsets(address, count * bits // 8, mask), count, bits)

    def store_at(self, address: Any, values: Any, bits: int, mask: Any, unfenced: bool = True) -> None:
        offset = self.offsets(address, len(values) * bits // 8, mask)
        self.store(offset, values, bits, mask)
        words = offset if mask is None else offset[mask]
        for step in range(0, max(len(values) * bits // 8, 4), 4):
            self.unfenced[(words + step) // 4] = unfenced

    def read_by_proxy(self, offset: Any) -> Any:
        """16-bit elements at byte offsets, as wgmma reads them."""
        if offset.min() < 0 or offset.max() + 2 > self.size:
            raise Fault(f"wgmma reads shared memory {offset.min()}..{offset.max() + 2}, there are {self.size} bytes")
        if self.unfenced[offset // 4].any():
            raise Fault("wgmma reads what an ordinary store wrote, and no fence.proxy.async came between")
        return self.views[16][offset // 2]

    def write_by_proxy(self, offset: Any, octets: Any) -> None:
        """Bytes at byte offsets, as a tensor copy writes them."""
        if offset.min() < 0 or offset.max() >= self.size:
            raise Fault(f"a copy writes shared memory {offset.min()}..{offset.max() + 1}, there are {self.size} bytes")
        self.octets[offset] = octets
        self.unfenced[offset // 4] = False
