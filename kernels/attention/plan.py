"""Which launch a call takes, from its sizes alone: tile, packed heads, splits, and whether warps are specialised."""

from typing import NamedTuple

import torch

from transfusion.kernels import tuning
from transfusion.kernels.tuning import Launch


class Plan(NamedTuple):
    """How the forward runs.

    launch: tile, warps, stages. packed: query heads whose rows lie side by side in one program; they read one key head.
    blocks: of rows, in each pack of heads. splits: programs that share the key tiles of a block.
    """

    launch: Launch
    packed: int
    blocks: int
    splits: int


def plan_forward(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int
) -> Plan:
    """The plan for q (batch, heads, queries, dim) over k (batch, kv_heads, keys, dim).

    A call with few query rows for each key head reads keys and computes little, so it takes small tiles and as many
    programs as keep the memory busy. Its workspace is bounded by the device: programs × rows of a tile × dim × 4 bytes.
    """
    group = max(heads // kv_heads, 1)
    launch, is_few = launch_forward(device, dtype, group, queries, dim)
    per_processor = 2 if is_few else 1
    packed = group if queries <= launch.block_q else 1
    blocks = -(-packed * queries // launch.block_q)
    programs, places = max(blocks * batch * heads // packed, 1), tuning.processors(device) * per_processor
    most = max(-(-keys // launch.block_k) // 2, 1)
    splits = max(1, min(places // programs, most))
    if is_few and splits < 4 and programs <= 4 * places:
        splits = _even_splits(programs, places, most)
    if launch.specialised and (packed > 1 or splits > 1 or not _specialised_fits(dtype, queries, keys, dim)):
        launch = launch.plain
    return Plan(launch, packed, blocks, splits)


def launch_forward(device: torch.device, dtype: torch.dtype, group: int, queries: int, dim: int) -> tuple[Launch, bool]:
    """The launch, specialised where the table's is, and whether it is the one for few rows: all that the tile depends
    on.

    No other question is asked about the sizes here, because each would become a guard of a compiled graph.
    """
    table = tuning.table_name(device)
    few = tuning.launch("attention", "decode", table, dtype, dim)
    if group * queries <= few.block_q:
        return few, True
    return tuning.launch("attention", "forward", table, dtype, dim), False


def launch_backward(device: torch.device, dtype: torch.dtype, stage: str, dim: int) -> Launch:
    """The launch of the kernel that makes dq ("query") or dk and dv ("key"); specialised where the table's is."""
    return tuning.launch("attention", f"backward_{stage}", tuning.table_name(device), dtype, dim)


def _even_splits(programs: int, places: int, most: int) -> int:
    """The number of splits, at most 4, that leaves the least of the device idle in its last turn.

    320 programs in 264 places take two turns; split by 4, they take five quarter turns. A gain below 5 % is not worth
    another split.
    """
    best = 1
    for splits in range(2, min(most, 4) + 1):
        turns, fewest = -(-programs * splits // places) / splits, -(-programs * best // places) / best
        best = splits if turns < 0.95 * fewest else best
    return best


def plan_backward(device: torch.device, dtype: torch.dtype, stage: str, queries: int, keys: int, dim: int) -> Launch:
    """`launch_backward` for these sizes: the same tile, plain where the specialised kernel does not fit."""
    launch = launch_backward(device, dtype, stage, dim)
    if launch.specialised and not _specialised_fits(dtype, queries, keys, dim):
        launch = launch.plain
    return launch


def _specialised_fits(dtype: torch.dtype, queries: int, keys: int, dim: int) -> bool:
    """Whether warp-specialised kernels take it: not empty, rows of a multiple of 16 bytes, widths with a swizzle."""
    return dtype.itemsize == 2 and dim % 8 == 0 and 32 < dim <= 128 and queries > 0 and keys > 0
