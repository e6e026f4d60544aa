"""Which launch a forward call takes, from its sizes alone: tile, packed heads, splits."""

from typing import NamedTuple

import torch

from transfusion.kernels import tuning


class Plan(NamedTuple):
    """How the forward runs.

    launch: tile, warps, stages. packed: query heads whose rows lie side by side in one program; they read one key head.
    blocks: of rows, in each pack of heads. splits: programs that share the key tiles of a block.
    """

    launch: tuning.Launch
    packed: int
    blocks: int
    splits: int


def plan_forward(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int
) -> Plan:
    """The plan for q (batch, heads, queries, dim) over k (batch, kv_heads, keys, dim).

    A call of few rows for each key head reads keys and computes little: small tiles, and as many programs as keep the
    memory busy. Its workspace is bounded by the device: programs × rows of a tile × dim × 4 bytes.
    """
    table, group = tuning.table_name(device), max(heads // kv_heads, 1)
    few = tuning.launch("attention", "decode", table, dtype, dim)
    many = tuning.launch("attention", "forward", table, dtype, dim)
    launch, per_processor = (few, 2) if group * queries <= few.block_q else (many, 1)
    packed = group if queries <= launch.block_q else 1
    blocks = -(-packed * queries // launch.block_q)
    programs = blocks * batch * heads // packed
    idle = tuning.processors(device) * per_processor // max(programs, 1)
    splits = max(1, min(idle, -(-keys // launch.block_k) // 2))
    if launch.specialised and (packed > 1 or splits > 1 or dim % 8 or not keys):  # rows of 16 bytes, and some
        launch = launch.plain
    return Plan(launch, packed, blocks, splits)
