"""`query_tiles`, `key_tiles`: a mask's intervals into the runs of tiles that attention walks, on their own device.

Custom ops, so that a compiled graph holds one node for them. On CUDA the Triton kernels; elsewhere, where only the
interpreter walks tiles, the reference.
"""

from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.mask_tiles import reference
from transfusion.kernels.mask_tiles.reference import WIDTH


def _module(intervals: Tensor) -> Any:
    if intervals.device.type != "cuda":
        return reference
    from transfusion.kernels.mask_tiles import kernel

    return kernel


@torch.library.custom_op("transfusion::query_tiles", mutates_args=())
def query_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(N / block_q), WIDTH) int32: for each query tile the runs of masked and of full key tiles."""
    result: Tensor = _module(intervals).query_tiles(intervals, num_queries, block_q, block_k)
    return result


@torch.library.custom_op("transfusion::key_tiles", mutates_args=())
def key_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(M / block_k), WIDTH) int32: for each key tile the runs of masked and of full query tiles."""
    result: Tensor = _module(intervals).key_tiles(intervals, num_queries, block_q, block_k)
    return result


@query_tiles.register_fake
def _(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    return intervals.new_empty((intervals.shape[0], -(-num_queries // block_q), WIDTH))


@key_tiles.register_fake
def _(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    return intervals.new_empty((intervals.shape[0], -(-intervals.shape[1] // block_k), WIDTH))
