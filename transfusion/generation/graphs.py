"""A function of tensors as one CUDA graph: where a step takes less time than launching its kernels, launch once."""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 2  # Triton compiles and PyTorch picks its algorithms before anything is captured


class Replayed:
    """replayed(function, *tensors) -> tensor: at the first call on CUDA captured, then replayed; elsewhere just called.

    The function is the same at every call and must do the same work: same shapes, no value read by the host, every
    tensor but its arguments at one address. Running it twice in a row must leave what running it once leaves. It is not
    kept, so that an owner whose method it is dies, with the graph's memory, without waiting for the cyclic collector.
    The result is overwritten by the next call.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._arguments: tuple[Tensor, ...] = ()
        self._result = torch.empty(0)

    def __call__(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """The function's result, of arguments like those of the first call."""
        if arguments[0].device.type != "cuda":
            return function(*arguments)
        if self._graph is None:
            self._capture(function, arguments)
        assert self._graph is not None
        for mine, given in zip(self._arguments, arguments, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._result

    def _capture(self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> None:
        self._arguments = tuple(argument.clone() for argument in arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*self._arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what a loader's thread does on the GPU meanwhile (encoding images) is no part of the graph
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = function(*self._arguments)
        self._graph = graph
