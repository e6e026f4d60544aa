"""Times of calls on rotated inputs, as quantiles, and the two ceilings of this machine: copy bandwidth and matmul.

On CUDA a batch of calls is queued behind a sleep of the device, so that it runs back to back and the events between
calls hold device time alone, however slow the host is. On a CPU it is wall-clock time.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.cases import DEVICE, DTYPE
from transfusion.kernels.device_clock import queued

# A compiled backward is timed by running it again and again on one graph, which it must not take apart.
torch._functorch.config.donated_buffer = False

_QUEUED = 8  # calls behind one sleep: few launches each, far below the depth of the driver's queue


class Times(NamedTuple):
    """Quantiles of a call's time in seconds, and of how many calls."""

    p20: float
    p50: float
    p80: float
    calls: int


class Effort(NamedTuple):
    """How long one thing is timed: seconds, and at least and at most so many calls."""

    seconds: float = 1.0
    least: int = 10
    most: int = 200


QUICK = Effort(0.2, 3, 30)


def quantiles(samples: list[float]) -> Times:
    """p20, p50, p80 of at least one sample."""
    p20, p50, p80 = (
        torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )
    return Times(p20, p50, p80, len(samples))


def synchronized(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` and then a wait for the device."""

    def call() -> Any:
        result = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def wall_time(call: Callable[[int], Any], effort: Effort) -> Times:
    """call(0), call(1), ... each with a wait for the device: what the host sees."""
    return quantiles(_in_turn([call], effort)[0])


def in_turn(call: Callable[[int], Any], beside: Callable[[int], Any], effort: Effort) -> tuple[Times, Times, float]:
    """`wall_time` of both, and the median of call's time over that of `beside`, the two in turn.

    A machine that slows down for seconds slows both down, so the quotient holds where the times do not.
    """
    first, second = _in_turn([call, beside], effort)
    return quantiles(first), quantiles(second), quantiles([a / b for a, b in zip(first, second, strict=True)]).p50


def _in_turn(calls: list[Callable[[int], Any]], effort: Effort) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        _seconds(call, 0)
    began, number = time.perf_counter(), 0
    while number < effort.least or (time.perf_counter() - began < effort.seconds and number < effort.most):
        for call, own in zip(calls, samples, strict=True):
            own.append(_seconds(call, number))
        number += 1
    return samples


def _seconds(call: Callable[[int], Any], number: int) -> float:
    start = time.perf_counter()
    synchronized(lambda: call(number))()
    return time.perf_counter() - start


def device_time(call: Callable[[int], Any], effort: Effort) -> Times:
    """call(0), call(1), ... on the device alone; on a CPU wall-clock time. Inputs should rotate with the number."""
    if DEVICE != "cuda":
        return wall_time(call, effort)
    for number in range(2):
        synchronized(lambda number=number: call(number))()
    start = time.perf_counter()
    call(0)
    host = time.perf_counter() - start  # what the sleep must hide for each call; at most the device's own time more
    torch.cuda.synchronize()
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < effort.least or (time.perf_counter() - began < effort.seconds and len(samples) < effort.most):
        first = len(samples)
        samples += queued([partial(call, first + place) for place in range(_QUEUED)], host)
    return quantiles(samples)


def cache_bytes() -> int:
    """The last cache that inputs must not stay in: L2 of the GPU, or 32 MiB for a CPU's own share of its L3."""
    return torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 32 << 20


def copies_past_cache(tensors: list[Tensor]) -> int:
    """How many sets of such inputs, rotated, hold more than twice the cache: at least 2, and 64 at most."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(2, min(64, 1 + 2 * cache_bytes() // max(size, 1)))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that holds, afterwards, the bytes that were allocated at the peak beyond those before; empty on a CPU."""
    peak: list[int] = []
    if DEVICE != "cuda":
        yield peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield peak
    torch.cuda.synchronize()
    peak.append(torch.cuda.max_memory_allocated() - before)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device copy far larger than any cache."""
    source = torch.randn((1 << 30 if DEVICE == "cuda" else 1 << 26) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / device_time(lambda number: target.copy_(source), Effort(0.5, 5)).p50


@functools.cache
def matmul_rate() -> float:
    """FLOP/s of a large square product in the dtype of the benchmarks, on random numbers."""
    size = 8192 if DEVICE == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=DEVICE, dtype=DTYPE)
    return 2 * size**3 / device_time(lambda number: left @ right, Effort(0.5, 5)).p50
