"""`launch(op, stage, ...)` -> block sizes, warps and stages, read from the tables in `tables/`.

A table is data: `{op: {stage: {bytes per element: {padded head dim: [..launch..]}}}}`, one file per
architecture (`sm_90.json`), `default.json` for the others and `interpret.json` for the Triton interpreter, whose
tiles are small so that a test of a hundred tokens crosses several. Nothing is tuned at run time.
"""

import copy
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from transfusion.kernels.gpus import gpu
from transfusion.kernels.registry import TRITON_INTERPRET


class Launch(NamedTuple):
    """Tile of queries by tile of keys, warps of a program, stages of its software pipeline.

    12 warps stand for a warp-specialised kernel, in which 4 copy and twice 4 compute; its stages are places for tiles.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def specialised(self) -> bool:
        """Whether it launches a warp-specialised kernel."""
        return self.num_warps == 12

    @property
    def plain(self) -> "Launch":
        """Itself, or the same tile with 8 warps of one kind, for calls that a warp-specialised launch does not fit."""
        return self._replace(num_warps=8, num_stages=3) if self.specialised else self


# Warp-specialised launches by stage and head dimension, for Hopper in 16 bits: `tune` tries them, and a table ships one
# where it was faster. Two groups of warps take 64 rows each of the 128 that a program owns: queries, or keys for
# backward_key.
SPECIALISED: dict[str, dict[int, tuple[Launch, ...]]] = {
    "forward": {
        64: (Launch(128, 128, 12, 2), Launch(128, 128, 12, 3)),
        128: (Launch(128, 64, 12, 3), Launch(128, 64, 12, 4)),
    },
    "backward_query": {
        64: (Launch(128, 64, 12, 3), Launch(128, 64, 12, 4)),
        128: (Launch(128, 64, 12, 3), Launch(128, 64, 12, 4)),
    },
    "backward_key": {
        64: (Launch(64, 128, 12, 3), Launch(128, 128, 12, 2)),
        128: (Launch(64, 128, 12, 2), Launch(64, 128, 12, 3)),
    },
}


Table = dict[str, dict[str, dict[int, dict[int, Launch]]]]


def _parse(text: str) -> Table:
    return {
        op: {
            stage: {int(size): {int(dim): Launch(*row) for dim, row in dims.items()} for size, dims in sizes.items()}
            for stage, sizes in stages.items()
        }
        for op, stages in json.loads(text).items()
    }


FOLDER = Path(__file__).parent / "tables"
_TABLES = {path.stem: _parse(path.read_text()) for path in FOLDER.glob("*.json")}


def table_name(device: torch.device) -> str:
    """Which table serves `device`."""
    if TRITON_INTERPRET or device.type != "cuda":
        return "interpret"
    name = architecture(device)
    return name if name in _TABLES else "default"


def architecture(device: torch.device) -> str:
    """The name that a table of this GPU has: "sm_90", "gfx942"."""
    return gpu(device).architecture


def processors(device: torch.device) -> int:
    """Multiprocessors of `device`; for the interpreter a few, so that splits occur."""
    if TRITON_INTERPRET or device.type != "cuda":
        return 8
    return gpu(device).processors


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a kernel's tile pads the head dimension to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launch(op: str, stage: str, table: str, dtype: torch.dtype, head_dim: int) -> Launch:
    """The launch of `stage` of `op` for this dtype and head dimension from the named table."""
    return _TABLES[table][op][stage][dtype.itemsize][padded_head_dim(head_dim)]


def launches(table: str, op: str) -> list[tuple[str, int, int, Launch]]:
    """Every (stage, bytes per element, padded head dim, launch) of one op in one table: what ships."""
    return [
        (stage, size, dim, launch)
        for stage, sizes in _TABLES[table][op].items()
        for size, dims in sizes.items()
        for dim, launch in dims.items()
    ]


def add_table(name: str) -> None:
    """Adds a table of that name, a copy of the default, unless there is one."""
    _TABLES.setdefault(name, copy.deepcopy(_TABLES["default"]))


def set_launch(op: str, stage: str, table: str, dtype: torch.dtype, head_dim: int, launch: Launch) -> None:
    """Puts a launch into a table, in this process; `save` writes it. Tiles kept for the old one are ignored."""
    _TABLES[table][op][stage][dtype.itemsize][padded_head_dim(head_dim)] = launch


def save(table: str) -> Path:
    """Writes a table, one launch a line, and returns its file."""
    path = FOLDER / f"{table}.json"
    text = json.dumps(_TABLES[table], indent=1)
    aside = path.with_suffix(".tmp")  # on a full disk the old table stays
    aside.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text) + "\n")
    os.replace(aside, path)
    return path
