"""`query_tiles`, `key_tiles`: a mask's intervals into the runs of tiles that attention walks, on their own device.

Custom ops, so that a compiled graph holds one node for them. On CUDA the Triton kernels; elsewhere, where only the
interpreter walks tiles, the reference. The rows of all tiles share one dimension: a separate one would have size 1 for
sequences of one tile, and torch.compile would make a graph of their own for these.
"""

from typing import Any

from torch import Tensor

from transfusion.kernels.dispatch import define
from transfusion.kernels.mask_tiles import reference
from transfusion.kernels.mask_tiles.reference import WIDTH


def _module(intervals: Tensor) -> Any:
    if intervals.device.type != "cuda":
        return reference
    from transfusion.kernels.mask_tiles import kernel

    return kernel


def _query_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(N / block_q)·WIDTH) int32: for each query tile the runs of masked and of full key tiles."""
    result: Tensor = _module(intervals).query_tiles(intervals, num_queries, block_q, block_k)
    return result


def _key_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(M / block_k)·WIDTH) int32: for each key tile the runs of masked and of full query tiles."""
    result: Tensor = _module(intervals).key_tiles(intervals, num_queries, block_q, block_k)
    return result


_SCHEMA = "(Tensor intervals, SymInt num_queries, SymInt block_q, SymInt block_k) -> Tensor"

query_tiles = define(
    "query_tiles",
    _SCHEMA,
    _query_tiles,
    lambda intervals, num_queries, block_q, block_k: intervals.new_empty(
        (intervals.shape[0], -(-num_queries // block_q) * WIDTH)
    ),
)
key_tiles = define(
    "key_tiles",
    _SCHEMA,
    _key_tiles,
    lambda intervals, num_queries, block_q, block_k: intervals.new_empty(
        (intervals.shape[0], -(-intervals.shape[1] // block_k) * WIDTH)
    ),
)
