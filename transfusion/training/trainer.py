"""The training loop: batches, losses, gradients, step, average; log, preview, checkpoint. Read `Trainer.run` first.

What a step minimises is a mean over the whole global batch, however it is cut into ranks and batches:

    loss = Σ nats of all text targets / their number  +  λ · Σ errors of all images / their number

so each batch's means are weighted by its share of the text targets and of the images; ranks may hold different numbers
of both. A run is a pure function of its config: the data stream is one of the seed, and the model draws nothing. So a
checkpoint holds weights, average, optimizer, step number, place in the stream and the log's running sums, and a resumed
run continues bitwise (on a CPU, on as many ranks as before).
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from transfusion.config import ModelConfig
from transfusion.model import Losses, Transfusion
from transfusion.sequence import Batch
from transfusion.training import parallel
from transfusion.training.checkpoint import Checkpoints, read
from transfusion.training.meter import Counts, LossMeter, SpeedMeter, peak_tflops
from transfusion.training.metrics import DataErrors, RunLog, open_log
from transfusion.training.optimizer import (
    TrainConfig,
    average,
    clip_gradients,
    learning_rate,
    make_optimizer,
    step_unless,
)
from transfusion.training.signals import stop_requested
from transfusion.training.world import World

Preview = Callable[[Transfusion], np.ndarray]

CHECKPOINTS = "checkpoints"  # in a run's folder


def read_averaged(checkpoint: Path, config: ModelConfig) -> Transfusion:
    """A whole model on the CPU with the averaged weights of a checkpoint, written by any number of ranks."""
    with torch.device("meta"):
        model = Transfusion(config)
    weights = {name: torch.empty_like(parameter, device="cpu") for name, parameter in model.named_parameters()}
    tensors = {f"average.{name}": weight for name, weight in weights.items()}
    read(checkpoint, tensors, World(torch.device("cpu")), partly=True)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


class BatchSource(Protocol):
    """What the trainer needs from a loader."""

    def iterate(self) -> Iterator[Batch]:
        """Batches without end, from the current state."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream continues after the last batch handed out: JSON, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` says, on any number of ranks."""

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of each sample that could not be used, in the order in which they were met."""


class Trainer:
    """Trains `model` on `loader`'s batches and keeps everything in `directory`, from which it resumes.

    model: as `parallel.distribute` left it. preview: draws a picture (height, width, 3) uint8 from the averaged model,
    for TensorBoard. All ranks of `world` must do the same with their trainers.
    """

    def __init__(
        self,
        model: Transfusion,
        loader: BatchSource,
        config: TrainConfig,
        directory: Path,
        preview: Preview | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World(model.head.weight.device)
        self.model, self.loader, self.config, self.directory, self.preview = model, loader, config, directory, preview
        self.parameters = dict(model.named_parameters())
        self.ema = {name: weight.detach().clone() for name, weight in self.parameters.items() if weight.requires_grad}
        self.optimizer = make_optimizer(model, config)
        self.checkpoints = Checkpoints(
            directory / CHECKPOINTS, config.keep_checkpoints, self.world, config.async_checkpoint
        )
        self.losses_seen = LossMeter(self.world, config.timestep_bins)
        self.speed = SpeedMeter(self.world, self._peak())
        self.all_trained = len(self.ema) == len(self.parameters)  # what FLOPs are counted for
        self.data_errors = DataErrors(directory / "data_errors.jsonl")
        self.step, self.errors_told, self.bad_in_a_row = 0, 0, 0

    def run(self) -> bool:
        """Trains to the last step. -> False where SIGTERM or SIGINT of any rank ended it early, after a checkpoint.

        Raises `FloatingPointError` if too many steps in a row, all steps, or the last half of them had to be skipped.
        """
        self.resume()
        batches, stopped = self.loader.iterate(), False
        stop_on_signals = stop_requested(second_interrupts=self.world.size == 1)
        with self.open_log() as log, stop_on_signals as stop, self.checkpoints:
            if self.step:
                log.say(f"continuing at step {self.step}")
            while self.step < self.config.steps and not stopped:
                stopped = self.train_step(batches, stop)
                self.step += 1
                if self._every(self.config.log_every):
                    self.log(log)
                if self.preview and self.config.preview_every and self._every(self.config.preview_every):
                    self.draw(log, self.preview)
                if self._every(self.config.checkpoint_every):
                    self.save()
                self.checkpoints.poll()
            if stopped:
                log.say(f"stopped at step {self.step}; saving {self.save()}")
        if not stopped and int(self.losses_seen.skipped) >= self.step:
            raise FloatingPointError(
                f"each of the {self.step} steps had a loss or gradient that is not finite and was skipped: nothing has "
                f"been learned. Lower learning_rate ({self.config.learning_rate}) or look at the data, and start anew "
                f"in another folder than {self.directory}"
            )
        if not stopped and 2 * self.bad_in_a_row >= self.step:
            raise self._gone_bad()
        return self.step == self.config.steps

    def train_step(self, batches: Iterator[Batch], stop: threading.Event | None = None) -> bool:
        """One optimizer step. -> whether any rank was asked to stop; nothing here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        waited = -time.monotonic()
        parts = [next(batches) for _ in range(self.config.accumulation)]
        waited += time.monotonic()
        counts = self.count(parts, stop)
        for number, part in enumerate(parts, start=1):
            batch = part.to(self.world.device)
            parallel.reduce_gradients(self.model, last=number == len(parts))
            losses = self.losses(batch)
            self.share(losses, batch, counts).backward()
            self.losses_seen.add(losses, batch)
        norm = clip_gradients(self.model, self.config.max_grad_norm)
        step_unless(self.losses_seen.close(norm), self.optimizer)
        self.optimizer.zero_grad()
        weights = [self.parameters[name] for name in self.ema]
        average(list(self.ema.values()), weights, self.step, self.config.ema_decay)
        self.speed.add(counts, waited)
        return counts.stops > 0

    def count(self, parts: list[Batch], stop: threading.Event | None) -> Counts:
        """What this step reads over all ranks, and how many of them were asked to stop."""
        counts = Counts(stops=int(stop is not None and stop.is_set()))
        for part in parts:
            counts = counts.plus(Counts.of(part, self.model.config, count_flops=self.all_trained))
        return Counts(*self.world.total(counts))

    def losses(self, batch: Batch) -> Losses:
        """The model's losses in the configured precision."""
        with parallel.cast(self.config.precision, self.world):
            return self.model(batch, self.config.impl)

    def share(self, losses: Losses, batch: Batch, counts: Counts) -> Tensor:
        """This batch's part of the step's loss, times the number of ranks, for gradients are averaged over them."""
        text = self.world.size * batch.text_rows.numel() / max(counts.text_targets, 1)
        image = self.world.size * batch.num_images / max(counts.images, 1)
        loss = text * losses.text + image * self.model.config.image_loss_weight * losses.image
        return loss if text and image else loss + parallel.zero_of_shared(self.model)

    def log(self, log: RunLog) -> None:
        """Waits for the device, as `train_step` does not. Raises `FloatingPointError` for too many skipped steps."""
        values = self.losses_seen.read()
        values |= {"learning_rate": learning_rate(self.step - 1, self.config), **self.speed.read()}
        values["skipped_samples"] = self._record_errors()
        log.scalars(self.step, values)
        bad = values["bad_steps_in_a_row"]
        if bad:
            log.say(f"step {self.step}: loss or gradient is not finite; {bad:.0f} step(s) in a row were skipped")
        self.bad_in_a_row = int(bad)
        if bad >= self.config.max_bad_steps:
            self.checkpoints.wait()
            raise self._gone_bad()

    def _gone_bad(self) -> FloatingPointError:
        last = [str(path) for path in self.checkpoints.paths()[-1:]] or ["none"]
        return FloatingPointError(
            f"the last {self.bad_in_a_row} steps up to step {self.step} had a loss or gradient that is not finite; "
            f"their updates were skipped. Lower learning_rate ({self.config.learning_rate}) or look at the data. "
            f"Last checkpoint: {last[0]}"
        )

    def draw(self, log: RunLog, preview: Preview) -> None:
        """A picture from the averaged model. A failure is logged, not raised: it would recur after every restart."""
        model = self.averaged(self.world.device)
        if model is None:
            return
        try:
            log.picture(self.step, "preview", preview(model))
        except Exception as error:
            log.say(f"no preview at step {self.step}: {type(error).__name__}: {error}")

    def averaged(self, device: torch.device | str) -> Transfusion | None:
        """A whole model on `device` with the averaged weights, on rank 0; None on others, which must call it too."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            weight = parallel.whole(self.ema.get(name, parameter.detach()))
            if self.world.main:
                weights[name] = weight.to(device)
        if not self.world.main:
            return None
        with torch.device("meta"):
            model = Transfusion(self.model.config)
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False).eval()

    def save(self) -> Path:
        """Writes this step's checkpoint."""
        record = {
            "data": self.loader.state_dict(),
            "batches_of_a_step": self.config.accumulation * self.world.size,
            "since_last_line": {"losses": self.losses_seen.state_dict(), "speed": self.speed.state_dict()},
        }
        return self.checkpoints.save(self.step, self._tensors(), record)

    def resume(self) -> None:
        """Loads the newest checkpoint, if there is one. Raises `ValueError` if it does not fit the model."""
        record = self.checkpoints.load_last(self._tensors())
        if record is not None:
            self.step = record["step"]
            self.loader.load_state_dict(record["data"])
            if told := record.get("since_last_line"):  # which checkpoints before this was kept do not say
                self.losses_seen.load_state_dict(told["losses"])
                self.speed.load_state_dict(told["speed"])

    def open_log(self) -> RunLog:
        """The run's log on rank 0, and none on the others."""
        if not self.world.main:
            return RunLog([])
        return open_log(self.directory, self.step, self.config.steps, self.config.wandb_project)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; the tensors themselves, to be read or written."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"average.{name}": weight for name, weight in self.ema.items()}
        for name in self.ema:
            state = self.optimizer.state[self.parameters[name]]
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return tensors | {"skipped_steps": self.losses_seen.skipped}

    def _record_errors(self) -> int:
        """Reports samples that any rank could not use to rank 0. -> how many it has recorded."""
        own = self.loader.skipped
        new = own[self.errors_told :]
        self.errors_told = len(own)
        if any(self.world.total([len(new)])):
            found = self.world.gather(new)
            if self.world.main:
                self.data_errors.add(self.step, found)
        return len(self.data_errors)

    def _peak(self) -> float | None:
        device = self.world.device
        if self.config.peak_tflops is not None or device.type != "cuda":
            return self.config.peak_tflops
        in_bfloat16 = parallel.uses_bfloat16(self.config.precision, device)
        return peak_tflops(torch.cuda.get_device_name(device)) if in_bfloat16 else None

    def _every(self, steps: int) -> bool:
        return self.step % steps == 0 or self.step == self.config.steps
