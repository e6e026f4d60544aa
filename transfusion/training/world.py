"""The processes that share a step: this one's rank among them, and the few numbers that they exchange."""

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size`. mesh: (shard) or (replicate, shard), None for one process alone.

    control and background are groups over the hosts (gloo): numbers that every rank must agree on travel there without
    waiting for a device, and a checkpoint that is written beside the training has one of its own.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sums over ranks, from host to host. Raises `ConnectionError` if another rank has died or hangs."""
        if self.control is None:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        try:
            dist.all_reduce(summed, group=self.control)
        except RuntimeError as error:
            raise ConnectionError(f"rank {self.rank}: another rank died or did not answer: {error}") from error
        return summed.tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Sums over ranks, on the device, without a host sync."""
        if self.size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def gather(self, value: T) -> list[T]:
        """Each rank's `value`, in order of rank; anything that pickles."""
        if self.control is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def main_first(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0, then on the others, which find what it wrote. Raises on all ranks if rank 0 fails."""
        try:
            made = make() if self.main else None
        except Exception:
            self.total([1])
            raise
        if any(self.total([0])):
            raise ConnectionError(f"rank {self.rank}: rank 0 cannot continue, and says why")
        return cast(T, made) if self.main else make()


@contextmanager
def join(device: str, shard: int = 0, timeout_seconds: float = 600.0) -> Iterator[World]:
    """The world that torchrun describes in the environment; without torchrun, this process alone on `device`.

    `shard` ranks share one copy of the weights (0: all). Raises `ValueError` where it does not divide their number.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(torch.device(device))
        return
    shard = shard or size
    if size % shard:
        raise ValueError(f"parallel.shard {shard} does not divide {size} ranks")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=timeout)
    control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    yield World(own, dist.get_rank(), size, _mesh(own, size, shard, timeout), control, background)
    dist.destroy_process_group()  # not after an error: it could wait for ranks that are gone


def _mesh(device: torch.device, size: int, shard: int, timeout: datetime.timedelta) -> DeviceMesh:
    if shard == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # groups of their own, with a default timeout of theirs
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return mesh
