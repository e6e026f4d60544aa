"""`python -m benchmarks --report`: tables and plots from the rows, so that no figure stands anywhere without its row.

A document asks for a table with two comment lines, and what is between them is written here:

    <!-- rows: SUITE MACHINE -->   ...   <!-- end of rows -->

MACHINE is a folder of benchmarks/results. Plots go to benchmarks/results/<machine>/<suite>-<plot>.png. Rows of --quick
are left out, and of each key the last one counts.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks import plots, rows
from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "kernels/*/README.md")
BLOCK = re.compile(r"(<!-- rows: (\S+) (\S+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
# A speed in prose, which no row stands behind; TB/s is how data sheets tell a memory's.
SPEED = re.compile(r"\d\s*(?:TFLOP/s|GB/s|tok(?:ens?)?/s|% MFU|images/s|×\s+(?:faster|slower|as fast))")


def main() -> int:
    """Draws every plot and fills every table."""
    for file in sorted(rows.RESULTS.glob("*/*.jsonl")):
        for plot in plots.draw(current(file), file.parent):
            print(plot)
    for document in documents():
        text = document.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            document.write_text(filled, encoding="utf-8")
            print(document)
    return 0


def documents() -> list[Path]:
    """Documents that may hold tables."""
    return [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def current(file: Path) -> list[Row]:
    """The rows of a file that count."""
    return rows.latest([row for row in rows.read(file) if not row.get("quick")])


def fill(text: str, results: Path = rows.RESULTS) -> str:
    """`text` with every table made anew."""

    def block(match: re.Match[str]) -> str:
        opening, suite, machine, closing = match.groups()
        return f"{opening}{table(suite, machine, results)}{closing}"

    return BLOCK.sub(block, text)


def bare_speeds(text: str) -> list[str]:
    """Speeds that stand outside every table of rows."""
    return [match[0] for match in SPEED.finditer(BLOCK.sub("", text))]


def table(suite: str, machine: str, results: Path = rows.RESULTS) -> str:
    """The Markdown of one suite on one machine, its conditions first; or which command would fill it."""
    if suite not in _TABLES:
        raise ValueError(f"there is no table of suite {suite!r}; choose one of {', '.join(_TABLES)}")
    found = [row for row in current(results / machine / f"{suite}.jsonl") if row["status"] == "ok"]
    command = f"python -m benchmarks --suite {suite}"
    if not found:
        return f"\nNo rows yet; on such a machine `{command}` makes them.\n\n"
    return f"\n{conditions(found)} `{command}`\n\n{_TABLES[suite](found)}\n"


def conditions(found: list[Row]) -> str:
    """Where the rows come from, in words; what most of them share."""

    def most(name: str) -> str:
        return str(Counter(str(row.get(name)) for row in found).most_common(1)[0][0])

    dirty = " with changes" if any(row.get("dirty") for row in found) else ""
    parts = [f"{most('device')}", f"torch {most('torch')}", f"triton {most('triton')}"]
    if most("driver") != "None":
        parts.append(f"driver {most('driver')}")
    else:
        parts.append(f"{most('threads')} threads")
    dates = sorted({row["date"][:10] for row in found})
    commits = sorted({row["commit"][:10] for row in found})
    return (
        f"{', '.join(parts)}; commit {', '.join(commits)}{dirty}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *lines])


def _pivot(found: list[Row], cell: Callable[[Row], str]) -> str:
    """Cases and measures down, baselines across."""
    baselines = list(dict.fromkeys(row["baseline"] for row in found))
    cells = {(row["case"], row["measure"], row["baseline"]): cell(row) for row in found}
    lines = [
        [case, measure, *(cells.get((case, measure, baseline), "–") for baseline in baselines)]
        for case, measure in dict.fromkeys((row["case"], row["measure"]) for row in found)
    ]
    return markdown(["case", "", *baselines], lines)


def _quotients(found: list[Row], speed: Callable[[Row], float]) -> Callable[[Row], str]:
    """-> the end of a row's cell: our speed over this one's, both of one commit; nothing for ours.

    What stands behind a comma in a baseline's name is a condition, in which ours has to be alike.
    """

    def key(row: Row) -> tuple[str, ...]:
        return row["case"], row["measure"], row["commit"], row["baseline"].partition(",")[2]

    def is_ours(row: Row) -> bool:
        return str(row["baseline"]).partition(",")[0] == "ours"

    ours = {key(row): speed(row) for row in found if is_ours(row)}
    return lambda row: "" if is_ours(row) or key(row) not in ours else f", {ours[key(row)] / speed(row):.2f}×"


def _rate(row: Row) -> float:
    """Calls a second."""
    return 1 / float(row["p50"])


def _attention(found: list[Row]) -> str:
    prepare = [row for row in found if row["measure"] == "prepare"]
    timed = [row for row in found if row["measure"] != "prepare"]
    starred = any(not row["same_mask"] for row in timed)
    text = "TFLOP/s over the area of the mask, median; in brackets the share of the roofline of this run. "
    text += "Last, how many times theirs ours are.\n"
    text += "\\* another mask (causal) of the same shape: a speed of light.\n" if starred else ""
    times = _quotients(timed, lambda row: row["tflops"])
    star = {True: "", False: " *"}
    text += "\n" + _pivot(timed, lambda r: f"{r['tflops']:.3g} ({r['share']:.0%}){star[r['same_mask']]}{times(r)}")
    if prepare:
        text += "\nMilliseconds to prepare the mask of a new batch, median; in brackets the share of our "
        text += "forward and backward of one layer. Last, × our time.\n\n"
        longer = _quotients(prepare, _rate)
        text += _pivot(prepare, lambda row: f"{row['p50'] * 1e3:.3g}{_share_of_a_layer(row, timed)}{longer(row)}")
    return text


def _share_of_a_layer(row: Row, timed: list[Row]) -> str:
    """What preparing the mask, which all layers share, is of one layer's attention, where that has a backward."""
    layer = {
        each["measure"]: each["p50"]
        for each in timed
        if (each["baseline"], each["case"], each["commit"]) == ("ours", row["case"], row["commit"])
    }
    return f" ({row['p50'] / sum(layer.values()):.1%})" if layer.keys() >= {"forward", "backward"} else ""


def _ops(found: list[Row]) -> str:
    text = "GB/s, each input and output counted once, median; in brackets the share of the copy bandwidth of this run. "
    text += "Last, × our time.\n\n"
    times = _quotients(found, _rate)
    return text + _pivot(found, lambda row: f"{row['gigabytes_per_second']:.3g} ({row['share']:.0%}){times(row)}")


def _tiles(found: list[Row]) -> str:
    """Launches that differ in the head dimension alone, one line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in found:
        visited = row["masked"] + row["full"]
        figures = (f"{row[name]:.2f}" for name in ("granularity", "walk", "overhead"))
        tile = f"{row['block_q']} × {row['block_k']}"
        line = (row["case"], row["measure"], tile, f"{visited}", f"{row['full'] / visited:.0%}", *figures)
        lines.setdefault(line, []).append(row["baseline"].removeprefix("head dim "))
    header = ["mask", "stage", "tile", "visited", "full", "granularity", "walk", "overhead", "head dim"]
    return markdown(header, [[*line, ", ".join(dims)] for line, dims in lines.items()])


def _train(found: list[Row]) -> str:
    text = "Milliseconds of a training step, median; in brackets the share of this run's matrix product rate, for our "
    text += "model. Last, × our time: the median of quotients of steps taken in turn.\n\n"

    def cell(row: Row) -> str:
        share = f" ({row['share']:.0%})" if "flops" in row else ""  # another network's are not counted
        return f"{row['p50'] * 1e3:.4g}{share}{_times_ours(row)}"

    return text + _pivot(found, cell)


def _times_ours(row: Row) -> str:
    return f", {row['times_ours']:.2f}×" if row.get("times_ours") else ""


def _generation(found: list[Row]) -> str:
    text = "Median of calls taken in turn; × our time is the median of their quotients.\n\n"
    lines = []
    for row in found:
        if row["baseline"] != "ours":
            ours = next(each for each in found if (each["case"], each["baseline"]) == (row["case"], "ours"))
            speeds = [f"{each['p50'] * 1e3:.4g} ms, {each['per_second']:.4g} {each['unit']}/s" for each in (ours, row)]
            lines.append([row["case"], row["baseline"], *speeds, f"{row['times_ours']:.2f}×"])
    return text + markdown(["case", "beside", "ours", "the other", "× our time"], lines)


def _denoise(found: list[Row]) -> str:
    return "Milliseconds of a denoising step, median.\n\n" + _pivot(found, lambda row: f"{row['p50'] * 1e3:.4g}")


def _host(found: list[Row]) -> str:
    times = _quotients(found, _rate)
    text = "Microseconds in which the host has queued a call, median. Last, × our time.\n\n"
    return text + _pivot(found, lambda row: f"{row['p50'] * 1e6:.3g}{times(row)}")


_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "attention": _attention,
    "ops": _ops,
    "host": _host,
    "tiles": _tiles,
    "train": _train,
    "denoise": _denoise,
    "generation": _generation,
}
