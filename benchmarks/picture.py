"""`python -m benchmarks.picture`: how real packed rows fall into empty, masked and full tiles, as a PNG.

The rows are the loader's own: texts, and captioned emoji of 256 tokens each, one document after the other. The picture
is kept beside the attention README.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiles import TABLE, loader_mask
from transfusion.kernels import IntervalMask, tuning
from transfusion.kernels.mask_tiles.reference import FULL, MASKED, tile_kinds, walked

TARGET = Path(__file__).parent.parent / "kernels" / "attention" / "tiles.png"
_COLORS = {"empty": "#eef1f5", "masked": "#f2a65a", "full": "#4178be"}
_INK = "#1f2933"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws, writes, and says where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    draw(options.out)
    print(options.out)
    return 0


def draw(file: Path, length: int = 4096, detail: int = 1024) -> None:
    """Of one batch the row of the longest texts, and the beginning of the row of most images, in tiles."""
    from matplotlib.figure import Figure

    mask = loader_mask(0.5, length)
    text, images = _row(mask, mask.area()), _row(mask, (mask.query_start.diff() == 0).sum(1))
    launch = tuning.launch("attention", "forward", TABLE, torch.bfloat16, 128)
    figure = Figure(figsize=(11, 5.9), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, row, shown in ((left, text, length), (right, images, detail)):
        _tiles(axes, row, launch.block_q, launch.block_k, shown)
    right.imshow(
        images.to_dense()[0, :detail, :detail].numpy(),
        cmap=_ink_map(),
        extent=(0, detail, detail, 0),
        interpolation="nearest",
        alpha=0.45,
    )
    _documents(right, images, detail)
    counts = _counts(text, launch.block_q, launch.block_k)
    left.set_title(f"a row of texts, {length} tokens: {counts}", fontsize=10, color=_INK)
    right.set_title(f"{detail} tokens of a row of captioned images; dark: visible pairs", fontsize=10, color=_INK)
    _legend(figure, f"tiles of {launch.block_q} queries × {launch.block_k} keys")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _row(mask: IntervalMask, most: Tensor) -> IntervalMask:
    """The row that has the most of something."""
    row = int(most.argmax())
    return IntervalMask(mask.query_start[row, None], mask.query_end[row, None], mask.num_queries)


def _tiles(axes: Any, row: IntervalMask, block_q: int, block_k: int, shown: int) -> None:
    from matplotlib.colors import ListedColormap

    kinds = walked(tile_kinds(row.intervals, row.num_queries, block_q, block_k))[0]
    part = kinds[: -(-shown // block_q), : -(-shown // block_k)]
    extent = (0, part.shape[1] * block_k, part.shape[0] * block_q, 0)
    colors = ListedColormap([_COLORS[name] for name in ("empty", "masked", "full")])
    axes.imshow(part.numpy(), cmap=colors, vmin=0, vmax=2, extent=extent, interpolation="nearest")
    axes.set_xticks(range(0, shown + 1, max(block_k, shown // 8)))
    axes.set_yticks(range(0, shown + 1, max(block_q, shown // 8)))
    for place in range(0, shown, block_k):
        axes.axvline(place, color="white", linewidth=0.6)
    for place in range(0, shown, block_q):
        axes.axhline(place, color="white", linewidth=0.6)
    axes.set_xlabel("key", color=_INK)
    axes.set_ylabel("query", color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)


def _documents(axes: Any, row: IntervalMask, shown: int) -> None:
    """The beginning of each document on both axes."""
    ends = sorted({end for end in row.query_end[0].tolist() if end < shown})
    for number, (first, last) in enumerate(zip([0, *ends], [*ends, shown], strict=True), start=1):
        if last - first > shown // 12:
            axes.text(last - 8, first + 12, f"document {number}", ha="right", va="top", fontsize=8, color="white")
        axes.plot([first, last], [first, first], color=_INK, linewidth=0.8, linestyle=":")
        axes.plot([last, last], [first, last], color=_INK, linewidth=0.8, linestyle=":")


def _counts(row: IntervalMask, block_q: int, block_k: int) -> str:
    kinds = walked(tile_kinds(row.intervals, row.num_queries, block_q, block_k))
    masked, full = int((kinds == MASKED).sum()), int((kinds == FULL).sum())
    return f"{kinds.numel() - masked - full} tiles empty, {masked} masked, {full} full"


def _ink_map() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([(0, 0, 0, 0), _INK])


def _legend(figure: Any, title: str) -> None:
    from matplotlib.patches import Patch

    meaning = {"empty": "empty: not visited", "masked": "masked: pairs compared", "full": "full: nothing compared"}
    handles = [Patch(facecolor=_COLORS[name], edgecolor="#9aa5b1", label=text) for name, text in meaning.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title=title, frameon=False, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
