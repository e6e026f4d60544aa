"""Where a run is logged: `log.jsonl`, TensorBoard, Weights & Biases, and a progress bar or plain lines."""

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from transfusion.files import write_whole

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere that scalars and pictures go."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Values of one step."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels (height, width, 3) uint8."""

    def close(self) -> None:
        """The last call."""


class JsonLines:
    """One line per call in `log.jsonl`; lines of steps after `start_step` are dropped, for those steps run again."""

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [line for line in read_log(path) if line.get("step", 0) <= start_step]
        write_whole(path, "".join(to_json(line) + "\n" for line in kept))  # a kill here must not take the log along
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line, on disk when this returns."""
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._file.flush()

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Text has no pictures."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class DataErrors:
    """`data_errors.jsonl`: one line per sample that could not be used, never twice, also across restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: list[dict[str, Any]] | None = read_log(path)
        self._known = {line.get("sample") for line in self._kept}

    def add(self, step: int, found: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Adds what each rank found, (sample, reason), at `step`."""
        if self._kept is not None:  # without the last line, where a kill cut it
            write_whole(self._path, "".join(map(_as_line, self._kept)))
            self._kept = None
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for rank, errors in enumerate(found):
                for sample, reason in errors:
                    if sample not in self._known:
                        self._known.add(sample)
                        file.write(_as_line({"step": step, "rank": rank, "sample": sample, "reason": reason}))

    def __len__(self) -> int:
        """Samples in the file."""
        return len(self._known)


def _as_line(error: dict[str, Any]) -> str:
    return json.dumps(error, ensure_ascii=False) + "\n"


class TensorBoard:
    """Event files in `folder`; what was there after `start_step` is hidden."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point in each curve."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """One picture in the series `name`."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes."""
        self._board.close()


class WeightsAndBiases:
    """A run of `project`, named after the folder; the same folder resumes the same run."""

    def __init__(self, project: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("train.wandb_project needs Weights & Biases: pip install wandb") from error
        self._wandb = wandb
        name = directory.resolve().name
        self._run = wandb.init(project=project, name=name, id=name, dir=str(directory), resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point in each curve."""
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """One picture in the series `name`."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


class Console:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        from tqdm import tqdm

        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not self._terminal)
        self._total, self._since = total_steps, (start_step, time.monotonic())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """The losses and the speed, in a line or in the bar."""
        summary = {
            "text": f"{values['text_loss']:.3f}",
            "image": f"{values['image_loss']:.4f}",
            "tok/s": f"{values['tokens_per_second']:,.0f}",
        }
        if "mfu_percent" in values:
            summary["MFU"] = f"{values['mfu_percent']:.1f}%"
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(summary)
        if not self._terminal:
            left = (self._total - step) / values["steps_per_second"]
            shown = "  ".join(f"{name} {value}" for name, value in summary.items())
            print(f"step {step}/{self._total}  {shown}  {left / 60:.1f} min left", flush=True)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Nothing to show it on."""

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        self._bar.write(message, file=sys.stderr) if self._terminal else print(message, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class RunLog:
    """All of a run's sinks; on ranks other than 0 there are none, and nothing is written."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Values of one step, everywhere."""
        for sink in self._sinks:
            sink.scalars(step, values)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels (height, width, 3) uint8, wherever pictures go."""
        for sink in self._sinks:
            sink.picture(step, name, pixels)

    def say(self, message: str) -> None:
        """A line for whoever watches."""
        for sink in self._sinks:
            if isinstance(sink, Console):
                sink.say(message)


def open_log(directory: Path, start_step: int, total_steps: int, wandb_project: str = "") -> RunLog:
    """The log of the run in `directory`, from `start_step` on."""
    sinks: list[Sink] = [
        JsonLines(directory / "log.jsonl", start_step),
        TensorBoard(directory / "tensorboard", start_step),
        Console(start_step, total_steps),
    ]
    if wandb_project:
        sinks.append(WeightsAndBiases(wandb_project, directory))
    return RunLog(sinks)


def to_json(values: dict[str, Any], indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinity become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), indent=indent, allow_nan=False)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, null as NaN; damaged ones are skipped with a warning, a cut last one without."""
    found, lines = [], path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line) if line else None
        except ValueError:
            values = line
        if isinstance(values, dict):
            found.append({name: math.nan if value is None else value for name, value in values.items()})
        elif line and number < len(lines):
            logger.warning("%s:%d is damaged and left out: %.60r", path, number, line)
    return found
