"""`queued(calls, host)`: seconds of each call on the device alone, however slow the host is."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch


def queued(calls: Sequence[Callable[[], Any]], host: float) -> list[float]:
    """Seconds of each call, by events between them: all wait behind a sleep of the device, then run back to back.

    calls: few launches in all, far below the depth of the driver's queue. host: seconds that the host takes to launch
    one of them, or more; the sleep hides 1.5 times that, and at most 0.1 s. Raises `RuntimeError` without CUDA.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda._sleep(int(min(1.5 * host * len(calls), 0.1) * 2e9))  # cycles of 2 GHz
    events[0].record()
    for call, done in zip(calls, events[1:], strict=True):
        call()
        done.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]
