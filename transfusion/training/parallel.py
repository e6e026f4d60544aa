"""A model whose blocks are checkpointed, compiled and sharded, in that order; the model's own code knows nothing of it.

    torchrun --nproc-per-node 8 -m transfusion train ...

With one process the model stays whole; everything else in training is the same code.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from transfusion.kernels.gpus import gpu
from transfusion.model import Transfusion
from transfusion.model.initialization import initial_value
from transfusion.training.activations import Checkpointing, checkpointed
from transfusion.training.world import World

_YEAR = 365 * 24 * 3600
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ParallelConfig:
    """Where a step runs, and what it recomputes; results change by rounding alone.

    Args:
        shard: ranks that share one copy of the weights: 0 is all of them (FSDP); fewer are replicated (HSDP).
        reshard_after_forward: free a block's weights after its forward and gather them again for its backward.
        checkpointing: "none" keeps every activation, "full" each block's input alone, "selective" also what attention
            gives and every other matrix product.
        compile: backend of torch.compile for each block, or "none".
        timeout_seconds: how long a rank waits for another one before it ends with an error.
    """

    shard: int = 0
    reshard_after_forward: bool = True
    checkpointing: Checkpointing = "none"
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.shard < 0:
            raise ValueError(f"shard must be a number of ranks, or 0 for all, got {self.shard}")
        if not 0 < self.timeout_seconds <= _YEAR:
            raise ValueError(f"timeout_seconds must be positive and at most a year, got {self.timeout_seconds}")


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether `precision` asks for it: "auto" does on CUDA, where the GPU computes in it (from NVIDIA's sm_80 on)."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and gpu(device).has_kernels)


def distribute(model: Transfusion, config: ParallelConfig, precision: Precision, world: World) -> None:
    """Checkpointing, then compilation, then sharding of each block, in place; the names of parameters stay.

    Weights are kept in float32 and sharded along their first dimension; a block's weights are gathered in bfloat16 if
    `precision` asks for it, and gradients are reduced in float32.
    """
    for block in model.transformer.blocks:
        block.forward = checkpointed(block.forward, config.checkpointing)
        if config.compile != "none":
            block.forward = torch.compile(block.forward, backend=config.compile, fullgraph=True)
    if world.mesh is None:
        return
    low = torch.bfloat16 if uses_bfloat16(precision, world.device) else None
    # The angles of the rotary embedding enter each block in float32 and stay so.
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
    )
    for block in model.transformer.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)


def cast(precision: Precision, world: World) -> AbstractContextManager[Any]:
    """The autocast context of a whole model's forward; a sharded one has its precision from `distribute`."""
    if world.mesh is None and uses_bfloat16(precision, world.device):
        return torch.autocast(world.device.type, torch.bfloat16)
    return nullcontext()


def reduce_gradients(model: nn.Module, last: bool) -> None:
    """Whether the next backward averages gradients over ranks, or only accumulates them on each."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def zero_of_shared(model: Transfusion) -> Tensor:
    """0·Σ of all weights outside of blocks: with it every rank reduces their gradients, whatever its batch lacks.

    To be called between forward and backward, when those weights are gathered.
    """
    inside = {id(parameter) for parameter in model.transformer.blocks.parameters()}
    shared = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return torch.stack([p.sum().float() for p in shared]).sum() * 0


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or a whole tensor itself; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def materialize(
    model: Transfusion, device: torch.device, seed: int, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Gives a model on the meta device its initial weights, on `device`: the same ones on any number of ranks.

    Each rank draws every weight tensor whole, one at a time, or takes it from `weights`, and keeps its shard.
    """
    assert not list(model.buffers()), "buffers have no initial value"
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        drawn = weights[name] if weights else initial_value(name, parameter.shape, model.config, seed)
        drawn = drawn.to(device)
        if isinstance(parameter, DTensor):
            drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        local(parameter).copy_(drawn)
