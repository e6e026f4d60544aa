"""What torch says of each GPU, asked once: an attention's forward and backward would ask eight times."""

from typing import NamedTuple

import torch

_KNOWN: dict[torch.device, "Gpu"] = {}


class Gpu(NamedTuple):
    """architecture: the name that a table of it has, "sm_90", "gfx942". processors: its multiprocessors.

    has_kernels: whether Triton's kernels are for it: bfloat16, asynchronous copies and their matrix instructions came
    with NVIDIA's sm_80.
    """

    architecture: str
    processors: int
    has_kernels: bool


def gpu(device: torch.device) -> Gpu:
    """What is known of a CUDA or ROCm device. Not cached for "cuda" alone, which may mean another GPU the next time."""
    if not torch.compiler.is_compiling() and device in _KNOWN:
        return _KNOWN[device]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        found = Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, properties.major >= 8)
    else:
        found = Gpu(properties.gcnArchName.split(":")[0], properties.multi_processor_count, True)
    if not torch.compiler.is_compiling() and device.index is not None:
        _KNOWN[device] = found
    return found
