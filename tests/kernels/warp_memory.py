"""What the machine of `warp_machine.py` computes on: views of shared memory, addresses, blocks that are copied."""

from typing import Any

import torch
from torch import Tensor

Scalar = int | Tensor


class Fault(AssertionError):
    """The kernel broke the rules of the machine."""


class Shared:
    """A view of shared memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = list(tensor.shape), tensor.dtype

    def index(self, at: int) -> "Shared":
        if not 0 <= at < self.shape[0]:
            raise Fault(f"place {at} of {self.shape[0]}")
        return Shared(self.tensor[at])

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.tensor.permute(order))

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.tensor.view(shape))

    def load(self, layout: object) -> Tensor:
        return self.tensor.clone()


class Pointer:
    """An address, or a tensor of them, in the storage of a tensor."""

    def __init__(self, tensor: Tensor, offset: Scalar = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Scalar) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    @property
    def storage(self) -> Tensor:
        first = self.tensor.storage_offset()
        return self.tensor.as_strided((self.tensor.untyped_storage().nbytes() // self.tensor.itemsize - first,), (1,))


class Descriptor:
    """What the tensor memory accelerator copies blocks of; past the ends it writes 0."""

    def __init__(self, host: Any) -> None:
        self.source = host.base.as_strided(tuple(host.shape), tuple(host.strides))
        self.block, self.dtype, self.layout = list(host.block_shape), host.base.dtype, host.layout

    def read(self, first: list[int]) -> Tensor:
        result = self.source.new_zeros(self.block)
        bounds = zip(first, self.block, self.source.shape, strict=True)
        spans = [slice(start, min(start + length, size)) for start, length, size in bounds]
        found = self.source[tuple(spans)]
        result[tuple(slice(0, size) for size in found.shape)] = found
        return result


def poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max // 3)


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0) -> int | Tensor:
    if isinstance(pointer.offset, int):
        return int(pointer.storage[pointer.offset])
    assert mask is not None
    result = torch.full(pointer.offset.shape, other, dtype=pointer.tensor.dtype)
    result[mask] = pointer.storage[pointer.offset[mask]]
    return result


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offset, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), mask)
    if value.dtype != pointer.tensor.dtype:
        raise Fault(f"{value.dtype} stored to {pointer.tensor.dtype}")
    pointer.storage[offset[mask]] = value.expand(mask.shape)[mask]
