"""Bytes that one rank holds in a step, planned on paper: the table of this folder's README.

    python -m transfusion.training.memory

States follow from the number of parameters. Activations are counted: one block of the model runs on tensors without
memory, and what is still alive after its forward is what it keeps. Buffers of allocator and collectives come on top.
"""

import gc
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from transfusion import presets
from transfusion.config import ModelConfig
from transfusion.kernels import IntervalMask
from transfusion.model import Transfusion
from transfusion.model.losses import CHUNK
from transfusion.model.transformer import Block
from transfusion.training.activations import Checkpointing, checkpointed


class StepMemory(NamedTuple):
    """Bytes on one rank.

    states: weights, gradients, both moments and the average, in float32, sharded. gathered: bfloat16 weights and
    gradients of two blocks and of all that is in no block, and one block's gradients in float32 on their way to the
    other ranks. activations: what all blocks keep. recomputed: one block's activations that are made again. head: the
    chunked cross-entropy.
    """

    states: int
    gathered: int
    activations: int
    recomputed: int
    head: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


def step_memory(config: ModelConfig, ranks: int, rows: int, row_length: int, mode: Checkpointing) -> StepMemory:
    """Of a step in bfloat16 on `ranks` that share one copy of the weights, with `rows` rows on each."""
    with torch.device("meta"):
        model = Transfusion(config)
    block = sum(parameter.numel() for parameter in model.transformer.blocks[0].parameters())
    shared = model.num_parameters() - config.layers * block
    tokens = rows * row_length
    kept = block_activations(config, rows, row_length, mode)
    return StepMemory(
        states=20 * model.num_parameters() // ranks,
        gathered=(2 + 2) * (2 * block + shared) + 4 * block,
        activations=config.layers * kept,
        recomputed=0 if mode == "none" else block_activations(config, rows, row_length, "none") - kept,
        head=CHUNK * config.vocab_size * (4 + 2) + config.vocab_size * config.dim * (4 + 2) + tokens * config.dim * 2,
    )


def block_activations(config: ModelConfig, rows: int, row_length: int, mode: Checkpointing) -> int:
    """Bytes that one block keeps between its forward and its backward, in bfloat16."""
    with FakeTensorMode():
        block = Block(config)
        weights: dict[str, Tensor] = {name: nn.Parameter(p.detach().bfloat16()) for name, p in block.named_parameters()}
        before = torch.empty(rows, row_length, config.dim, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = torch.empty(2, rows, row_length, 1, config.head_dim // 2)
        mask = IntervalMask.causal(row_length)
        forward = checkpointed(partial(functional_call, block, weights), mode)
        with _Alive() as alive:
            out = forward((before.clone(), cos, sin, mask, "reference"))  # the clone lives on where the block keeps it
        return alive.bytes() - out.untyped_storage().nbytes()  # what comes out is the next block's to keep


class _Alive(TorchDispatchMode):
    """Every storage that an op made and that something still refers to."""

    def __init__(self) -> None:
        super().__init__()
        self._made: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._made[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return result

    def bytes(self) -> int:
        """Of all of them."""
        gc.collect()
        return sum(self._made.values())


def table() -> str:
    """The 7B preset on 8 ranks, and its neighbours, as Markdown."""
    lines = [
        "| preset | ranks | checkpointing | states | gathered | activations | recomputed | head | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases: tuple[tuple[str, int], ...] = (("7b", 8), ("7b", 64), ("1.4b", 8))
    for name, ranks in cases:
        modes: tuple[Checkpointing, ...] = ("none", "selective", "full")
        for mode in modes:
            memory = step_memory(presets.get(name), ranks, rows=1, row_length=4096, mode=mode)
            numbers = " | ".join(f"{part / 2**30:.1f}" for part in (*memory, memory.total))
            lines.append(f"| {name} | {ranks} | {mode} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
