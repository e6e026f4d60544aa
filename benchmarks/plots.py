"""Plots of rows: bars of rates, speed against length, roofline, memory, overhead of tiles, parts of a training step.

Each is drawn where there are rows for it; white ground and dark ink read well on light and on dark pages.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

_INK = "#1f2933"
_COLORS = ("#4178be", "#f2a65a", "#5aa469", "#b0578d", "#7f8c99", "#c9b458", "#3c9fae", "#d1605e", "#8a6fb3", "#9c7a58")


def draw(found: list[Row], folder: Path) -> list[Path]:
    """Every plot that the rows of one suite give, as PNG in `folder`; -> the files."""
    timed = [row for row in found if row["status"] == "ok"]
    suite = timed[0]["suite"] if timed else ""
    files = []
    for name, chosen, paint in _PLOTS.get(suite, ()):
        part = [row for row in timed if chosen(row)]
        if part:
            files.append(_save(folder / f"{suite}-{name}.png", part, paint))
    return files


def _save(file: Path, found: list[Row], paint: Callable[[Any, list[Row]], None]) -> Path:
    from matplotlib.figure import Figure

    cases = len({row["case"] for row in found})
    figure = Figure(figsize=(9, max(4.0, 1.2 + 0.55 * cases)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    paint(axes, found)
    axes.tick_params(labelsize=8, colors=_INK)
    where = found[0]
    caption = f"{where['device']}, torch {where['torch']}, triton {where['triton']}, commit {where['commit'][:10]}"
    figure.supxlabel(caption, fontsize=7, color=_INK)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return file


def _color(found: list[Row]) -> dict[str, str]:
    names = dict.fromkeys(row["baseline"] for row in found)
    return {name: _COLORS[place % len(_COLORS)] for place, name in enumerate(names)}


def _bars(axes: Any, found: list[Row], value: Callable[[Row], float], label: str) -> None:
    """One group of bars for each case, one bar for each baseline."""
    colors = _color(found)
    cases = list(dict.fromkeys(row["case"] for row in found))
    width = 0.8 / len(colors)
    for place, (baseline, color) in enumerate(colors.items()):
        own = [row for row in found if row["baseline"] == baseline]
        heights = [cases.index(row["case"]) + (place - (len(colors) - 1) / 2) * width for row in own]
        axes.barh(heights, [value(row) for row in own], width, color=color, label=baseline)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel(label, color=_INK)
    _legend(axes)


def _legend(axes: Any) -> None:
    """Above the axes, where no bar or line is."""
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def _rate(axes: Any, found: list[Row]) -> None:
    _bars(axes, found, lambda row: row["tflops"], f"TFLOP/s {found[0]['measure']}, over the area of the mask")


def _bandwidth(axes: Any, found: list[Row]) -> None:
    _bars(axes, found, lambda row: row["gigabytes_per_second"], f"GB/s {found[0]['measure']}")
    axes.axvline(found[0]["ceiling_gigabytes_per_second"], color=_INK, linestyle="--", linewidth=1)


def _memory(axes: Any, found: list[Row]) -> None:
    _bars(axes, found, lambda row: row["peak_bytes"] / 2**20, "MiB at the peak, beyond the inputs")
    axes.set_xscale("log")


def _against_length(axes: Any, found: list[Row]) -> None:
    """Lines over the number of keys, one for each baseline and family of cases."""
    colors = _color(found)
    families: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in found:
        shape = row["shape"]
        kind = f"{shape['layout']}, {shape['heads']}:{shape['kv_heads']} heads"
        families.setdefault((row["baseline"], kind), []).append((shape["keys"], row["tflops"]))
    kinds = list(dict.fromkeys(kind for _, kind in families))
    for (baseline, kind), points in families.items():
        if len(points) > 1:
            style = ("-", "--", ":", "-.")[kinds.index(kind) % 4]
            lengths, rates = zip(*sorted(points), strict=True)
            axes.plot(
                lengths, rates, style, marker="o", markersize=3, color=colors[baseline], label=f"{baseline}, {kind}"
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("keys", color=_INK)
    axes.set_ylabel("TFLOP/s forward", color=_INK)
    _legend(axes)


def _roofline(axes: Any, found: list[Row]) -> None:
    """Rate over FLOPs per byte, under the two ceilings of the run."""
    for row, marker in ((row, "o" if row["measure"] == "forward" else "s") for row in found):
        intensity = 1e3 * row["tflops"] / row["gigabytes_per_second"]
        axes.plot(intensity, row["tflops"], marker, color=_COLORS[0] if marker == "o" else _COLORS[1])
        axes.annotate(
            row["case"], (intensity, row["tflops"]), fontsize=6, color=_INK, xytext=(4, 2), textcoords="offset points"
        )
    compute, memory = found[0]["ceiling_tflops"], found[0]["ceiling_gigabytes_per_second"] / 1e3
    intensities = [0.25 * 2**step for step in range(18)]
    axes.plot(intensities, [min(compute, memory * each) for each in intensities], color=_INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must move  (circle: forward, square: backward)", color=_INK)
    axes.set_ylabel("TFLOP/s", color=_INK)


def _overhead(axes: Any, found: list[Row]) -> None:
    """Visited tiles over the minimum, the masked part and the full part."""
    names = [f"{row['case']}, {row['baseline'].removeprefix('head dim ')}" for row in found]
    full = [row["full"] / row["minimum"] for row in found]
    axes.barh(range(len(names)), full, color=_COLORS[0], label="full loop")
    axes.barh(
        range(len(names)),
        [row["masked"] / row["minimum"] for row in found],
        left=full,
        color=_COLORS[1],
        label="masked loop",
    )
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tiles visited / (mask area / tile area), forward", color=_INK)
    _legend(axes)


def _step(axes: Any, found: list[Row]) -> None:
    _bars(axes, found, lambda row: row["p50"] * 1e3, f"ms a step of {found[0]['suite']}")


def _host(axes: Any, found: list[Row]) -> None:
    _bars(axes, found, lambda row: row["p50"] * 1e6, "µs in which the host has queued a call")


def _breakdown(axes: Any, found: list[Row]) -> None:
    """Where a step's time goes, by the profiler."""
    names = [f"{row['case']}, {row['baseline']}" for row in found]
    parts = list(dict.fromkeys(part for row in found for part in row["breakdown"]))
    left = [0.0] * len(found)
    for place, part in enumerate(parts):
        widths = [row["breakdown"].get(part, 0.0) * 1e3 for row in found]
        axes.barh(names, widths, left=left, color=_COLORS[place % len(_COLORS)], label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_xlabel("ms of a training step, by the profiler", color=_INK)
    _legend(axes)


Plot = tuple[str, Callable[[Row], bool], Callable[[Any, list[Row]], None]]
_PLOTS: dict[str, tuple[Plot, ...]] = {
    "attention": (
        ("forward", lambda row: row["measure"] == "forward", _rate),
        ("backward", lambda row: row["measure"] == "backward", _rate),
        ("length", lambda row: row["measure"] == "forward" and row["shape"]["group"] in "de", _against_length),
        ("roofline", lambda row: row["measure"] != "prepare" and row["baseline"] == "ours", _roofline),
        ("memory", lambda row: row["measure"] == "backward" and bool(row["peak_bytes"]), _memory),
    ),
    "ops": (
        ("forward", lambda row: row["measure"] == "forward", _bandwidth),
        ("backward", lambda row: row["measure"] == "backward", _bandwidth),
    ),
    "host": (("call", lambda row: True, _host),),
    "tiles": (("overhead", lambda row: row["measure"] == "forward", _overhead),),
    "train": (
        ("step", lambda row: True, _step),
        ("breakdown", lambda row: bool(row.get("breakdown")), _breakdown),
    ),
    "denoise": (("step", lambda row: True, _step),),
}
