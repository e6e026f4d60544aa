"""A function of tensors as one CUDA graph: if launching a step's kernels takes longer than the step, launch once."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

# Calls before the capture: Triton compiles and PyTorch picks its algorithms, and what is called no more often than this
# (a token of one row, say) is not worth a graph.
EAGER = 2
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_ONE_AT_A_TIME = threading.Lock()  # a capture begins with a wait for the device, which breaks another that is under way


def is_replayed(device: torch.device) -> bool:
    """Whether `Replayed` captures what runs on `device`."""
    return device.type == "cuda"


class Replayed:
    """replayed(function, *tensors) -> tensor: on CUDA captured at the third call, then replayed; elsewhere just called.

    The function is the same at every call and must do the same work: same shapes, no value read by the host, every
    tensor but its arguments at one address. It is not kept, so that an owner whose method it is dies, with the graph's
    memory, without waiting for the cyclic collector. The result is overwritten by the next call.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._arguments: tuple[Tensor, ...] = ()
        self._result = torch.empty(0)
        self._calls = 0

    def __call__(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """The function's result, of arguments like those of the first call."""
        device = arguments[0].device
        self._calls += 1
        if not is_replayed(device):
            return function(*arguments)
        if self._calls <= EAGER:  # aligned as in the capture, in which nothing that depends on it could be compiled
            return function(*(argument.clone() for argument in arguments))
        with torch.cuda.device(device):  # streams are those of the current device
            if self._graph is None:
                self._graph = self._captured(function, arguments, device)
            for mine, given in zip(self._arguments, arguments, strict=True):
                mine.copy_(given)
            self._graph.replay()
        return self._result

    def _captured(
        self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...], device: torch.device
    ) -> "torch.cuda.CUDAGraph":
        self._arguments = tuple(argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        # Left alone, torch captures on a stream of the device that was current at the first capture of all: the graph
        # of another would be empty. "thread_local": what other threads do on the GPU meanwhile is no part of it.
        # One for all captures: of a device's 32 streams a new one would in time be one that a loader's thread works on.
        with _ONE_AT_A_TIME:
            if device not in _STREAMS:
                _STREAMS[device] = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=_STREAMS[device], capture_error_mode="thread_local"):
                self._result = function(*self._arguments)
        return graph
