"""`moved(tensor, device, non_blocking)`: a copy to a GPU for which neither the host nor the stream waits."""

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str, non_blocking: bool) -> Tensor:
    """`tensor` on `device`; with non_blocking, a copy to a GPU goes through pinned memory.

    A copy from pageable memory waits for the stream whatever `non_blocking` says. A copy to the CPU always blocks:
    without a wait it would be read before it has arrived.
    """
    if not isinstance(device, torch.device | str | int):
        raise TypeError(f"to() takes a device, got {device!r}; what it moves keeps its dtype")
    if not non_blocking or torch.device(device).type != "cuda":
        return tensor.to(device)
    pinned = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)
