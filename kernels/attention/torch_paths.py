"""The same mask through PyTorch's own attention: SDPA under the dense mask, FlexAttention under a BlockMask.

SDPA is what `auto` takes where no Triton kernel runs; both are baselines of the benchmarks. Their dense mask or
BlockMask is built once per `IntervalMask` and kept with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transfusion.kernels.interval_mask import IntervalMask


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """`scaled_dot_product_attention` under the dense mask: O(N·M) bytes for the mask."""
    dense = mask.to_dense()[:, None]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Compiled `flex_attention`; a block mask of one row broadcasts over the batch."""
    from torch.nn.attention.flex_attention import flex_attention

    compiling = torch.compiler.is_compiling()
    attention: Callable[..., Any] = flex_attention if compiling else _compiled_flex()  # type: ignore[assignment]
    result: Tensor = attention(
        q,
        k,
        v,
        block_mask=mask.once("block_mask", mask.to_block_mask),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return result


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
