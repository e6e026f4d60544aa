"""Attention of other libraries under the same mask, where they are installed: nothing here is required.

flash-attn-4              FlashAttention 4 in CuTe: a `mask_mod` over lists of partial and of full tiles
nvidia-cudnn-frontend     `cudnn.flex_attention`: for each query its visible keys as intervals
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapter import Baseline
from benchmarks.cases import DEVICE, AttentionCase
from transfusion.kernels import IntervalMask

_CHUNK = 1024  # queries whose dense mask is looked at once


def _missing(module: str, package: str) -> str | None:
    if DEVICE != "cuda":
        return "it runs on CUDA only"
    if torch.cuda.get_device_capability(0)[0] < 9:
        return "it needs compute capability 9.0 or newer"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    return None if found else f"{module} is not installed (pip install {package})"


class FlashAttention4(Baseline):
    """FlashAttention 4 with the two vectors as auxiliary tensors of its `mask_mod`, and tiles of 128 × 128."""

    def __init__(self) -> None:
        super().__init__("fa4 mask_mod", "flash-attn-4")

    def why_not(self, case: AttentionCase) -> str | None:
        return _missing("flash_attn.cute", "flash-attn-4")

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        block = mask.to_block_mask(128)
        forward = (block.kv_num_blocks, block.kv_indices, block.full_kv_num_blocks, block.full_kv_indices)
        backward = (block.q_num_blocks, block.q_indices, block.full_q_num_blocks, block.full_q_indices)
        lists = [BlockSparseTensorsTorch(*lists, block_size=(128, 128)) for lists in (forward, backward)]
        return lists, [mask.query_start.contiguous(), mask.query_end.contiguous()]

    def __call__(self, prepared: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn.cute.interface import flash_attn_func

        (forward, backward), vectors = prepared
        out: Tensor = flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)),
            mask_mod=_cute_mask_mod(vectors[0].shape[0] > 1),
            aux_tensors=vectors,
            block_sparse_tensors=forward,
            block_sparse_tensors_bwd=backward if q.requires_grad else None,
        )[0]
        return out.transpose(1, 2)


@functools.cache
def _cute_mask_mod(per_row: bool) -> Any:
    """The mask as a CuTe callable; cached, for each new one is compiled anew."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, vectors: Any) -> Any:
        row = batch[0] if cutlass.const_expr(per_row) else 0
        column = cutlass.min(key[0], seqlen_info.seqlen_k - 1)
        visible = (vectors[0][row, column] <= query[0]) & (query[0] < vectors[1][row, column])
        return utils.scalar_to_ssa(visible, cutlass.Boolean)

    return mask_mod


class CudnnFlex(Baseline):
    """`cudnn.flex_attention`; its plan, which waits for the device, is part of the preparation."""

    def __init__(self) -> None:
        super().__init__("cudnn flex", "nvidia-cudnn-frontend")

    def why_not(self, case: AttentionCase) -> str | None:
        return _missing("cudnn.flex_attention", "nvidia-cudnn-frontend")

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        from cudnn.flex_attention import create_mask_plan

        endpoints = query_intervals(mask, q.shape[0]).permute(2, 0, 1).flatten(1)[None].contiguous()
        return create_mask_plan(endpoints, *(t.transpose(1, 2).contiguous() for t in (q, k, v)))

    def __call__(self, prepared: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from cudnn.flex_attention import flex_attn_func

        out: Tensor = flex_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), mask_plan=prepared)
        return out.transpose(1, 2)


def query_intervals(mask: IntervalMask, batch: int) -> Tensor:
    """(batch, N, 2·R + 1) int32: query i sees keys [0, F0), [F1, F2), ...; R runs at most, a missing one empty."""
    index = torch.arange(mask.num_queries, device=mask.device)
    chunks = [_runs(mask, rows) for rows in index.split(_CHUNK)]
    width = max(chunk.shape[-1] for chunk in chunks)
    padded = [torch.cat([c, c[..., -1:].expand(*c.shape[:2], width - c.shape[-1])], -1) for c in chunks]
    return torch.cat(padded, 1).expand(batch, -1, -1)


def _runs(mask: IntervalMask, queries: Tensor) -> Tensor:
    """The same for a few queries: 0, then beginning and end of each run of visible keys."""
    start, end = mask.query_start[:, None], mask.query_end[:, None]
    visible = (start <= queries[None, :, None]) & (queries[None, :, None] < end)
    edges = torch.nn.functional.pad(visible, (1, 1))
    edges = edges[..., 1:] != edges[..., :-1]
    count = edges.sum(-1)
    position = edges.nonzero()
    place = torch.arange(len(position), device=mask.device) - (
        count.flatten().cumsum(0) - count.flatten()
    ).repeat_interleave(count.flatten())
    result = torch.zeros(*count.shape, 1 + int(count.max()), dtype=torch.int32, device=mask.device)
    result[position[:, 0], position[:, 1], 1 + place] = position[:, 2].to(torch.int32)
    last = result.amax(-1, keepdim=True)
    return torch.where(torch.arange(result.shape[-1], device=mask.device) > count[..., None], last, result)
