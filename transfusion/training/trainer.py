"""The training loop: batch, losses, gradient, step, average; log, preview, checkpoint. Read `Trainer.run` first.

A run is a pure function of its config: batch k of the loader is one of the seed, and the model draws nothing. So
a checkpoint holds weights, average, optimizer and step number, and a resumed run continues bitwise (on a CPU).
"""

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from transfusion.model import Losses, Transfusion
from transfusion.sequence import Batch
from transfusion.training.checkpoint import Checkpoints
from transfusion.training.metrics import RunLog
from transfusion.training.optimizer import TrainConfig, average, learning_rate, make_optimizer, step_unless

Preview = Callable[[Transfusion], np.ndarray]


class BatchSource(Protocol):
    """What the trainer asks of a loader: batch(start), batch(start + 1), ..., each a pure function of its number."""

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches without end."""
        ...


class Trainer:
    """Trains `model` on `loader`'s batches and keeps everything in `directory`; goes on where it stopped.

    preview: draws a picture (height, width, 3) uint8 from the averaged model, for TensorBoard.
    """

    def __init__(
        self,
        model: Transfusion,
        loader: BatchSource,
        config: TrainConfig,
        directory: Path,
        preview: Preview | None = None,
    ) -> None:
        self.model, self.loader, self.config, self.directory, self.preview = model, loader, config, directory, preview
        self.device = model.head.weight.device
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = make_optimizer(model, config)
        self.checkpoints = Checkpoints(directory / "checkpoints", config.keep_checkpoints)
        self.step = 0
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=self.device)  # in a row, not finite
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def run(self) -> bool:
        """Trains to the last step. -> False where SIGTERM or SIGINT ended it early, after a checkpoint."""
        self.resume()
        batches = self.loader.iterate(self.step * self.config.accumulation)
        with RunLog(self.directory, self.step, self.config.steps) as log, _stop_requested() as stop:
            if self.step:
                log.say(f"continuing at step {self.step}")
            while self.step < self.config.steps and not stop.is_set():
                report, tokens = self.train_step(batches)
                self.step += 1
                if self._every(self.config.log_every):
                    self.log(log, report, tokens)
                if self.preview and self.config.preview_every and self._every(self.config.preview_every):
                    log.picture(self.step, "preview", self.preview(self.ema))
                if self._every(self.config.checkpoint_every):
                    self.save()
            if stop.is_set():
                log.say(f"stopped at step {self.step}; saved {self.save()}")
        return self.step == self.config.steps

    def train_step(self, batches: Iterator[Batch]) -> tuple[Tensor, int]:
        """One optimizer step. -> (text loss, image loss, gradient norm) on the device, and the tokens it read."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        report, tokens = torch.zeros(3, device=self.device), 0
        for _ in range(self.config.accumulation):
            batch = next(batches)
            tokens += batch.token_ids.numel()
            losses = self.losses(batch.to(self.device))
            (losses.total / self.config.accumulation).backward()
            report[:2] += torch.stack([losses.text, losses.image]).detach() / self.config.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        not_finite = ~(norm.isfinite() & report.isfinite().all())
        step_unless(not_finite, self.optimizer)
        self.optimizer.zero_grad()
        average(self.ema, self.model, self.step, self.config.ema_decay)
        self.bad_steps = torch.where(not_finite, self.bad_steps + 1, 0)
        self.skipped += not_finite
        report[2] = norm
        return report, tokens

    def losses(self, batch: Batch) -> Losses:
        """The model's losses in the configured precision."""
        wants_bf16 = self.config.precision == "bfloat16" or (
            self.config.precision == "auto" and self.device.type == "cuda"
        )
        cast: AbstractContextManager[Any] = nullcontext()
        if wants_bf16:
            cast = torch.autocast(self.device.type, torch.bfloat16)
        with cast:
            return self.model(batch, self.config.impl)

    def log(self, log: RunLog, report: Tensor, tokens: int) -> None:
        """The one place that waits for the device. Raises `FloatingPointError` where too many steps were skipped."""
        text, image, norm, bad, skipped = torch.cat([report, self.bad_steps[None], self.skipped[None]]).tolist()
        values = {
            "text_loss": text,
            "image_loss": image,
            "gradient_norm": norm,
            "learning_rate": learning_rate(self.step - 1, self.config),
            "skipped_steps": skipped,
        }
        log.scalars(self.step, tokens, values)
        if bad:
            log.say(f"step {self.step}: loss or gradient is not finite; {bad:.0f} step(s) in a row were skipped")
        if bad >= self.config.max_bad_steps:
            last = [str(path) for path in self.checkpoints.paths()[-1:]] or ["none"]
            raise FloatingPointError(
                f"the last {bad:.0f} steps up to step {self.step} had a loss or gradient that is not finite; their "
                f"updates were skipped. Lower learning_rate ({self.config.learning_rate}) or look at the data. "
                f"Last checkpoint: {last[0]}"
            )

    def save(self) -> Path:
        """Writes a checkpoint of this step."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
        }
        return self.checkpoints.save(self.step, state)

    def resume(self) -> None:
        """Loads the newest checkpoint, if there is one. Raises `ValueError` where it does not fit the model."""
        state = self.checkpoints.load_last(self.device)
        if state is None:
            return
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.checkpoints.paths()[-1]} is of another model: {error}") from error
        self.step, self.skipped = state["step"], state["skipped"]

    def _every(self, steps: int) -> bool:
        return self.step % steps == 0 or self.step == self.config.steps


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second SIGINT interrupts at once, as ever."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
