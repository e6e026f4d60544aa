"""Suite "tiles": a static cost model of the attention kernels' schedule. Needs no GPU.

    overhead = tiles visited / (mask area / tile area)  =  granularity × walk
    granularity = tiles that hold a visible pair / (mask area / tile area)     the price of tiles of this size
    walk        = tiles visited / tiles that hold a visible pair               the price of how runs are kept; at best 1

A visited tile runs in the masked loop or, where every pair of it is visible, in the full loop, which compares nothing.
"""

import functools
import random
from typing import NamedTuple

import torch

from benchmarks import rows
from benchmarks.cases import long_images_row, packed_row
from transfusion.kernels import IntervalMask, tuning
from transfusion.kernels.mask_tiles.reference import WIDTH

SUITE = "tiles"
TABLE = "sm_90"
STAGES = ("forward", "backward_query", "backward_key")
HEAD_DIMS = (64, 128)
TARGET = 1.15

MASKS = (
    "one document, 256-token images",
    "packed, 256-token images",
    "packed, 16-token images",
    "16k, 4096-token images",
    "hidden copies, 256-token images",
    "loader, captioned emoji",
    "loader, half text",
    "causal",
)


class Cost(NamedTuple):
    """Tiles of `block_q` × `block_k` that one stage visits for a mask: in its masked loop, in its full loop."""

    block_q: int
    block_k: int
    masked: int
    full: int
    touched: int
    area: int

    @property
    def minimum(self) -> float:
        """Mask area / tile area: below this no tiling of this size can go."""
        return self.area / (self.block_q * self.block_k)

    @property
    def granularity(self) -> float:
        """Tiles that hold a visible pair over the minimum."""
        return self.touched / self.minimum

    @property
    def walk(self) -> float:
        """Tiles visited over tiles that hold a visible pair."""
        return (self.masked + self.full) / self.touched

    @property
    def overhead(self) -> float:
        """Tiles visited over the minimum."""
        return (self.masked + self.full) / self.minimum


def mask(name: str, length: int = 4096) -> IntervalMask:
    """One of `MASKS`, a few rows on the CPU; the loader's are real batches of the package's own data."""
    rng = random.Random(0)
    if name.startswith("loader"):
        return loader_mask(0.5 if "text" in name else 0.0, length)
    if name == "causal":
        return IntervalMask.causal(length)
    if name.startswith("one document"):
        return long_images_row(length, 256, rng)
    if name.startswith("hidden"):
        return _hidden_copies(length, 256, rng)
    if name.startswith("16k"):
        return long_images_row(16384, 4096, rng)
    image_tokens = 16 if "16-token" in name else 256
    return IntervalMask.stack([packed_row(length, image_tokens, rng) for _ in range(4)])


def _hidden_copies(length: int, image_tokens: int, rng: random.Random) -> IntervalMask:
    """One document in which each image comes noised, hidden from all that follows, and then clean."""
    images: list[tuple[int, int]] = []
    start = rng.randint(8, 40)
    while start + 2 * image_tokens <= length:
        images += [(start, start + image_tokens), (start + image_tokens, start + 2 * image_tokens)]
        start += 2 * image_tokens + rng.randint(8, 40)
    return IntervalMask.from_spans(length, images, None, range(0, len(images), 2))


@functools.cache
def loader_mask(text_fraction: float, length: int = 4096) -> IntervalMask:
    """The mask of the first batch that the package's loader packs: captioned emoji of 256 tokens, and pydoc's texts."""
    from transfusion.data import Loader, LoaderConfig, Tokenizer
    from transfusion.data.emoji import EmojiSource
    from transfusion.data.texts import PydocTextSource

    images, texts = EmojiSource(32, "train", "demo"), PydocTextSource("test")
    tokenizer = Tokenizer.train([*(texts[i] for i in range(len(texts))), *images.captions], 2048)
    config = LoaderConfig(rows=4, row_length=length, image_size=32, patch_size=2, text_fraction=text_fraction)
    return Loader(config, tokenizer, images, texts).batch(0).mask


def cost(mask: IntervalMask, stage: str, head_dim: int, table: str = TABLE) -> Cost:
    """What `stage` of the 16-bit kernels visits under `mask` with the launch that ships for `head_dim`."""
    launch = tuning.launch("attention", stage, table, torch.bfloat16, head_dim)
    if stage == "backward_key":
        lines = mask.key_tiles(launch.block_k, launch.block_q)
    else:
        lines = mask.query_tiles(launch.block_q, launch.block_k)
    tiles, masked = (int(lines.view(-1, WIDTH)[:, number].sum()) for number in (2, 3))
    touched = sum(_touched(row, launch.block_q, launch.block_k) for row in _single_rows(mask))
    return Cost(launch.block_q, launch.block_k, masked, tiles - masked, touched, int(mask.area().sum()))


def _single_rows(mask: IntervalMask) -> list[IntervalMask]:
    pairs = zip(mask.query_start.split(1), mask.query_end.split(1), strict=True)
    return [IntervalMask(start, end, mask.num_queries) for start, end in pairs]


def _touched(row: IntervalMask, block_q: int, block_k: int) -> int:
    """Tiles of one row's dense mask in which something is visible."""
    dense = row.to_dense()[0]
    padding = (0, -row.num_keys % block_k, 0, -row.num_queries % block_q)
    tiles = torch.nn.functional.pad(dense, padding).unflatten(0, (-1, block_q)).unflatten(2, (-1, block_k))
    return int(tiles.any(3).any(1).sum())


def pairs() -> list[tuple[str, str]]:
    """(mask, head dimension) of the suite."""
    return [(name, f"head dim {dim}") for name in MASKS for dim in HEAD_DIMS]


def run(name: str, head_dim: str) -> list[rows.Row]:
    """One row for each stage; "missed" says why a cost is above the target."""
    try:
        chosen = mask(name)
    except ImportError as error:
        return [rows.row(SUITE, name, head_dim, STAGES[0], "skipped", reason=str(error))]
    return [_row(name, head_dim, stage, cost(chosen, stage, int(head_dim.split()[-1]))) for stage in STAGES]


def _row(name: str, head_dim: str, stage: str, cost: Cost) -> rows.Row:
    figures = {key: getattr(cost, key) for key in ("minimum", "granularity", "walk", "overhead")}
    missed = None
    if cost.overhead > TARGET:
        missed = f"tiles of {cost.block_q}x{cost.block_k} are cut by document ends" if cost.walk < 1.01 else "walk"
    return rows.row(SUITE, name, head_dim, stage, "ok", table=TABLE, **cost._asdict(), **figures, missed=missed)
