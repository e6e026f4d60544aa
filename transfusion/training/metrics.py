"""What a run says of itself: scalars in `log.jsonl` and TensorBoard, a progress bar or plain lines."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class RunLog:
    """Scalars and pictures of a run from `start_step` on; lines of steps that are run again are dropped."""

    def __init__(self, directory: Path, start_step: int, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path = directory / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= start_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not self._terminal)
        self._total, self._since = total_steps, (start_step, time.monotonic())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def scalars(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """One line of the log; `tokens`: of each step since the last line."""
        before, then = self._since
        now = time.monotonic()
        rate = (step - before) / max(now - then, 1e-9)
        self._since = (step, now)
        line: dict[str, Any] = {"step": step, **values, "tokens_per_second": tokens * rate, "steps_per_second": rate}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            self._board.add_scalar(name, value, step)
        summary = {
            "text": f"{values['text_loss']:.3f}",
            "image": f"{values['image_loss']:.4f}",
            "tok/s": f"{tokens * rate:,.0f}",
        }
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(summary)
        if not self._terminal:
            left = (self._total - step) / rate
            shown = "  ".join(f"{name} {value}" for name, value in summary.items())
            print(f"step {step}/{self._total}  {shown}  {left / 60:.1f} min left", flush=True)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels (height, width, 3) uint8, into TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        self._bar.write(message, file=sys.stderr) if self._terminal else print(message, flush=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
