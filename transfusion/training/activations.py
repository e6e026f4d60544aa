"""Activation checkpointing: a block's forward that keeps less, and computes the rest again in the backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "selective", "full"]


def checkpointed(forward: Callable[..., Any], mode: Checkpointing) -> Callable[..., Any]:
    """`forward`, keeping all its activations ("none"), its inputs alone ("full"), or also `_kept_ops` ("selective")."""
    if mode == "none":
        return forward
    # The model draws no random numbers, so no generator state needs saving.
    wrapped = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return partial(wrapped, context_fn=_selective_contexts) if mode == "selective" else wrapped


def _kept_ops() -> set[Any]:
    """The ops whose results are worth their memory: attention in all its forms, and matrix products."""
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    attention = {getattr(torch.ops.aten, name).default for name in names}
    return {torch.ops.transfusion.attention.default, torch.ops.aten.mm.default, *attention}


def _selective_contexts() -> tuple[Any, Any]:
    """Keeps `_kept_ops`, but only every other matrix product (torchtitan's balance of memory and time)."""
    kept, products = _kept_ops(), {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op == torch.ops.aten.mm.default:
            products[ctx.is_recompute] += 1
            if products[ctx.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return contexts
