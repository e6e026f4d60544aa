"""Losses over all ranks without a host sync, and the speed of training.

    text_loss   Σ nats / Σ text targets          over every rank, batch and step since the last line of the log
    image_loss  Σ of each image's error / images  likewise, and apart for each part of the diffusion path
    mfu         floating point operations of the model's formula / seconds / (ranks · peak of one device)

Steps that were skipped count in none of the losses. A checkpoint keeps what was summed since the last line, so a run
that was stopped or killed and resumed logs the same lines as one that was not.
"""

import logging
import re
import resource
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.config import ModelConfig
from transfusion.model import Losses
from transfusion.model.flops import training_flops
from transfusion.sequence import Batch
from transfusion.training.world import World

logger = logging.getLogger(__name__)

# Dense bfloat16 TFLOP/s of one device without sparsity, from the makers' data sheets; the first that matches.
_PEAK_BFLOAT16 = (
    (r"\bB200\b", 2250.0),
    (r"\bH200\b|\bGH200\b", 989.4),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100\b", 989.4),
    (r"\bA100\b", 311.9),
    (r"\bL40S\b", 362.0),
    (r"\bMI300X\b|\bMI325X\b", 1307.4),
)


def peak_tflops(device_name: str) -> float | None:
    """Peak bfloat16 TFLOP/s of the device of this name; None if unknown."""
    return next((peak for pattern, peak in _PEAK_BFLOAT16 if re.search(pattern, device_name)), None)


class Counts(NamedTuple):
    """Integer counts of one step; their sum over ranks is the global batch's.

    tokens: positions that hold one, image patches included. Floating point operations are those of
    `transfusion.model.flops`: of text tokens and the head, of image tokens and the codec, and of what the mask lets
    attention see; all 0 where they are not counted. stops: ranks that were asked to stop.
    """

    text_targets: int = 0
    images: int = 0
    tokens: int = 0
    image_tokens: int = 0
    positions: int = 0
    text_flops: int = 0
    image_flops: int = 0
    attention_flops: int = 0
    stops: int = 0

    @staticmethod
    def of(batch: Batch, config: ModelConfig, count_flops: bool) -> "Counts":
        """The counts of one batch, which is still on the host."""
        flops = training_flops(config, batch) if count_flops else None
        image_tokens = batch.image_rows.numel()
        text_tokens = int((batch.token_ids != config.special.pad).sum())
        return Counts(
            batch.text_rows.numel(),
            batch.num_images,
            text_tokens + image_tokens,
            image_tokens,
            batch.token_ids.numel(),
            *((int(flops.text + flops.head), int(flops.image + flops.codec), int(flops.attention)) if flops else ()),
        )

    def plus(self, other: "Counts") -> "Counts":
        """Field by field."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class LossMeter:
    """Sums of losses on the device: of the current step, and of all good steps since the last reading."""

    def __init__(self, world: World, bins: int) -> None:
        self._world, self._bins = world, bins
        self._edges = torch.arange(bins, device=world.device)
        self._step = self._zeros()
        self._interval = self._zeros()
        self.gradient_norm = torch.zeros((), device=world.device)
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)

    def _zeros(self) -> Tensor:
        return torch.zeros(2 + 2 * self._bins, dtype=torch.float64, device=self._world.device)

    def add(self, losses: Losses, batch: Batch) -> None:
        """Adds one batch of this rank."""
        text = losses.text.detach().double() * batch.text_rows.numel()
        targets = torch.full_like(text, batch.text_rows.numel())
        part = (batch.times * self._bins).long()
        member = (part[:, None] == self._edges).double()  # (I, bins)
        self._step += torch.cat([text[None], targets[None], losses.per_image.detach().double() @ member, member.sum(0)])

    def close(self, gradient_norm: Tensor) -> Tensor:
        """Ends the step. -> whether a loss or gradient of any rank was not finite, 0-dim bool, the same on all."""
        sums = self._world.sum(self._step)
        not_finite = ~(gradient_norm.isfinite() & sums.isfinite().all())
        self._interval += torch.where(not_finite, 0.0, sums)
        self._step = self._zeros()
        self.gradient_norm = gradient_norm
        self.bad_in_a_row = torch.where(not_finite, self.bad_in_a_row + 1, 0)
        self.skipped = self.skipped + not_finite
        return not_finite

    def state_dict(self) -> list[float]:
        """The sums since the last reading, the same on every rank. Waits."""
        sums: list[float] = self._interval.tolist()
        return sums

    def load_state_dict(self, sums: list[float]) -> None:
        """Continues from `sums`; with a warning from zero, if they are of another number of timestep bins."""
        if len(sums) != len(self._interval):
            logger.warning("timestep_bins has changed: the next line of the log is of the steps from here on alone")
            return
        self._interval = torch.tensor(sums, dtype=torch.float64, device=self._world.device)

    def read(self) -> dict[str, float]:
        """Means since the last reading (NaN where nothing was seen), and the last step's gradient norm. Waits."""
        state = torch.stack([self.gradient_norm.double(), self.bad_in_a_row.double(), self.skipped.double()])
        norm, bad, skipped, nats, targets, *bins = torch.cat([state, self._interval]).tolist()
        self._interval = self._zeros()
        errors, images = bins[: self._bins], bins[self._bins :]
        values = {"text_loss": _mean(nats, targets), "image_loss": _mean(sum(errors), sum(images))}
        for index, (error, count) in enumerate(zip(errors, images, strict=True)):
            name = f"image_loss_time_{index / self._bins:.2f}_{(index + 1) / self._bins:.2f}"
            values |= {name: error / count} if count else {}
        return values | {"gradient_norm": norm, "skipped_steps": skipped, "bad_steps_in_a_row": bad}


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


class SpeedMeter:
    """Tokens, FLOPs and time since the last reading, over all ranks as seen from this one."""

    def __init__(self, world: World, peak: float | None) -> None:
        self._device, self._peak = world.device, None if peak is None else peak * 1e12 * world.size
        self._start()

    def _start(self) -> None:
        self._counts, self._steps, self._waited, self._since = Counts(), 0, 0.0, time.monotonic()

    def add(self, counts: Counts, waited: float) -> None:
        """One step: its global counts, and the seconds in which this host waited for data."""
        self._counts, self._steps, self._waited = self._counts.plus(counts), self._steps + 1, self._waited + waited

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last reading, and the seconds since then: JSON."""
        seconds = time.monotonic() - self._since
        return {"counts": list(self._counts), "steps": self._steps, "waited": self._waited, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`, as if no time had passed since."""
        self._counts, self._steps, self._waited = Counts(*state["counts"]), state["steps"], state["waited"]
        self._since = time.monotonic() - state["seconds"]

    def read(self) -> dict[str, float]:
        """Rates and shares since the last reading; memory is this rank's peak."""
        seconds, counts = max(time.monotonic() - self._since, 1e-9), self._counts
        values = {
            "tokens_per_second": counts.tokens / seconds,
            "images_per_second": counts.images / seconds,
            "steps_per_second": self._steps / seconds,
            "data_wait_percent": 100 * self._waited / seconds,
            "packing_fill": counts.tokens / max(counts.positions, 1),
            "image_token_share": counts.image_tokens / max(counts.tokens, 1),
            "peak_memory_gib": _peak_memory(self._device) / 2**30,
        }
        parts = {"text": counts.text_flops, "image": counts.image_flops, "attention": counts.attention_flops}
        total = sum(parts.values())
        if total:
            values["tflops_per_second"] = total / seconds / 1e12
        if total and self._peak:
            values["mfu_percent"] = 100 * total / seconds / self._peak
            values |= {f"mfu_percent_{name}": 100 * flops / seconds / self._peak for name, flops in parts.items()}
        self._start()
        return values


def _peak_memory(device: torch.device) -> int:
    """Bytes: the peak that torch allocated on a GPU, elsewhere the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
