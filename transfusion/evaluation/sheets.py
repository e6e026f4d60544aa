"""Pictures of a run: what it generates beside what it was shown, guidance side by side, captions, loss curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INK, _FAINT = "#222222", "#888888"


def pixels(image: Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] -> (h, w, 3) uint8."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def nearest(images: Tensor, candidates: Tensor) -> Tensor:
    """(I,) index of the candidate with the smallest mean squared difference to each image."""
    return torch.cdist(images.flatten(1), candidates.flatten(1)).argmin(1)


def contact_sheet(images: Tensor | Sequence[Tensor], columns: int = 8) -> np.ndarray:
    """Images (3, h_i, w_i) in [-1, 1] as one picture (height, width, 3) uint8, each in the middle of its cell."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    sizes = (len(images) + -len(images) % columns, 3, height, width)
    cells = torch.ones(sizes, dtype=torch.float32, device="cpu")
    for cell, image in zip(cells, images, strict=False):
        top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
        cell[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    grid = cells.unflatten(0, (-1, columns))
    return pixels(grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))


def _cells(rows: int, columns: int, width: float = 1.25, height: float = 1.5) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height + 0.5), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _show(axis: Any, image: Tensor, title: str, color: str = _INK) -> None:
    axis.imshow(pixels(image), interpolation="nearest")
    axis.set_title("\n".join(_wrap(title)), fontsize=7, color=color, pad=2)


def _wrap(text: str, width: int = 18) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, max_lines=2, placeholder="…") or [" "]


def sample_sheet(path: Path, captions: Sequence[str], generated: Tensor, training: Tensor, columns: int = 8) -> None:
    """For each caption the generated image, and under it the nearest image of the training set."""
    rows = -(-len(captions) // columns)
    figure, axes = _cells(2 * rows, columns, height=1.35)
    twins = training[nearest(generated, training)]
    for index, caption in enumerate(captions):
        row, column = divmod(index, columns)
        _show(axes[2 * row][column], generated[index], caption)
        _show(axes[2 * row + 1][column], twins[index], "nearest in training", _FAINT)
    figure.suptitle("caption, generated image; below each the nearest training image", fontsize=9, color=_INK)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def guidance_sheet(path: Path, captions: Sequence[str], by_scale: dict[float, Tensor]) -> None:
    """One row for each guidance scale, one column for each caption; the same starting noise in a column."""
    figure, axes = _cells(len(by_scale), len(captions))
    for row, (scale, images) in enumerate(by_scale.items()):
        for column, image in enumerate(images):
            _show(axes[row][column], image, f"{captions[column]}, {scale:g}")
    figure.suptitle("caption, guidance scale", fontsize=9, color=_INK)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def caption_sheet(path: Path, images: Tensor, true: Sequence[str], generated: Sequence[str], columns: int = 8) -> None:
    """Each image with the caption that the model gives it, and the true one in brackets where they differ."""
    rows = -(-len(true) // columns)
    figure, axes = _cells(rows, columns)
    for index, (said, meant) in enumerate(zip(generated, true, strict=True)):
        title = said if said == meant else f"{said} [{meant}]"
        _show(axes[index // columns][index % columns], images[index], title)
    figure.suptitle("the model's caption [true caption, where it differs]", fontsize=9, color=_INK)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def loss_curves(path: Path, log: Sequence[dict[str, Any]]) -> None:
    """Text and image loss over the steps, as logged and smoothed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in log]
    for axis, key, label in (
        (left, "text_loss", "text: nats per token"),
        (right, "image_loss", "image: mean squared error"),
    ):
        values = np.array([line[key] for line in log])
        window = max(1, len(values) // 20)
        smooth = [values[max(0, i - window + 1) : i + 1].mean() for i in range(len(values))]
        axis.plot(steps, values, color="#9ecae1", linewidth=0.8)
        axis.plot(steps, smooth, color="#08519c", linewidth=1.6)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    right.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
