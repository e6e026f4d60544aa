"""A small AutoencoderKL trained on your own images: loss = |x - x̂| + kl_weight·KL + perceptual_weight·d(x, x̂).

KL is summed over the latents and divided by the pixels' numbers, which gives the weights of latent diffusion
(arXiv 2112.10752) and of arXiv 2408.11039, section 4.1, their meaning. The resulting folder is what
`--data.autoencoder` reads: diffusers' config and weights, with the scaling and shift that give the latents of the
training images mean 0 and deviation 1.
"""

import contextlib
import copy
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.config import check_finite
from transfusion.data.packing import seeded
from transfusion.data.sources import ImageSource, SampleError
from transfusion.data.transforms import check_image_size, to_tensor
from transfusion.evaluation.distances import load_features
from transfusion.evaluation.sheets import contact_sheet
from transfusion.files import write_whole
from transfusion.kernels.transfer import moved
from transfusion.optional import require
from transfusion.training.checkpoint import Checkpoints
from transfusion.training.metrics import JsonLines
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

logger = logging.getLogger(__name__)

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(x, x̂), both (I, 3, H, W) in [-1, 1] -> a distance of any shape, averaged over the batch."""

_SETTINGS, _SHEET, _LOG, _WEIGHTS = (
    "training.json",
    "reconstructions.png",
    "log.jsonl",
    "diffusion_pytorch_model.safetensors",
)
_MEASURED = 512  # images that the scaling factor is measured on, at most
_LOG_EVERY = 20  # steps


@dataclass(frozen=True)
class AutoencoderConfig:
    """The network and its training.

    Args:
        image_size: pixels a side; images are cropped to their central square and resized.
        latent_channels: of a latent.
        channels: width of each level; each level after the first halves the size.
        layers_per_block: residual blocks of a level.
        steps: of the optimizer.
        batch_size: images of a step.
        learning_rate: at its highest; it warms up over a twentieth of the steps and then falls to a hundredth.
        kl_weight: 1e-6 as latent diffusion has it.
        perceptual_weight: of the perceptual distance, where there is one.
        ema_decay: of the weights that are kept in the end; 0 keeps the last.
        max_grad_norm: gradients are clipped to it.
        checkpoint_every: steps from one checkpoint and sheet of reconstructions to the next.
        max_bad_steps: so many steps in a row that are not finite end the run; or the last half of them.
        seed: of weights, order and latents.
    """

    image_size: int = 64
    latent_channels: int = 4
    channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = 1
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 1e-3
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    ema_decay: float = 0.995
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500
    max_bad_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "layers_per_block", "steps", "batch_size", "checkpoint_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be positive widths, got {self.channels}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        check_finite(self, ("learning_rate",), ("kl_weight", "perceptual_weight"))
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}; inf does not clip")
        check_image_size(self.image_size, 2 ** (len(self.channels) - 1), 1)


def feature_distance(file: Path, device: torch.device | str = "cpu") -> Perceptual:
    """|f(x) - f(x̂)|², averaged, of a TorchScript network f that reads images (I, 3, H, W) in [0, 1].

    Raises `FileNotFoundError` or `ValueError` naming a file that is not a TorchScript network.
    """
    network = load_features(file, device)
    assert isinstance(network, torch.nn.Module)
    for parameter in network.parameters():  # a script module refuses requires_grad_
        parameter.requires_grad = False
    return lambda x, y: (network((x + 1) / 2) - network((y + 1) / 2)).square().mean()


class AutoencoderTrainer:
    """Trains an AutoencoderKL on `images`, in the folder `out`; resumes one that stopped. `run()` -> whether it
    finished.

    out/checkpoints/ and log.jsonl while it trains, reconstructions.png beside them; config.json and weights at the end.
    perceptual: a distance between images to add to the loss. An image that cannot be read is named in the log and
    replaced by the next.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        images: ImageSource,
        out: Path,
        device: torch.device | str = "cpu",
        perceptual: Perceptual | None = None,
    ) -> None:
        self.config, self.images, self.out, self.perceptual = config, images, out, perceptual
        self.device = torch.device(device)
        _same_settings(out, {"config": asdict(config), "images": len(images), "perceptual": perceptual is not None})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.vae = make_autoencoder_kl(config).to(self.device)
        self.ema = copy.deepcopy(self.vae).requires_grad_(False).eval()
        rate, warmup = config.learning_rate, max(1, config.steps // 20)
        self.schedule = TrainConfig(config.steps, 1, rate, rate / 100, warmup, (0.9, 0.99), weight_decay=0.0)
        self.optimizer = make_optimizer(self.vae, self.schedule)
        self.checkpoints = Checkpoints(out / "checkpoints", 2, World(self.device))
        self.skipped: dict[str, str] = {}
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")
        self.step = 0
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=self.device)  # in a row, not finite

    def run(self) -> bool:
        """Trains to the last step, then writes the autoencoder. -> False if a signal ended it, after a checkpoint."""
        self._resume()
        tqdm = require("tqdm").tqdm
        terminal = sys.stderr.isatty()
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not terminal)
        log = JsonLines(self.out / _LOG, self.step)
        with bar, stop_requested(second_interrupts=True) as stop, contextlib.closing(log):
            for batch in self._batches(self.step):
                if self.step == self.config.steps or stop.is_set():
                    break
                losses = self.train_step(batch)
                self.step += 1
                bar.update()
                if self.step % _LOG_EVERY == 0 or self.step == self.config.steps:
                    shown = self._report(losses)
                    log.scalars(self.step, shown)
                    bar.set_postfix(shown)
                    if not terminal:
                        print(f"step {self.step}/{self.config.steps}  {shown}", flush=True)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self._save()
            if stop.is_set():
                self._save()
                return False
        self._write()
        return True

    def train_step(self, images: Tensor) -> dict[str, Tensor]:
        """One step on images (I, 3, H, W). A loss or gradient that is not finite changes nothing, and is counted."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.schedule)
        images = moved(images, self.device, non_blocking=True)
        generator = seeded(self.config.seed, "latents", self.step)
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32, device="cpu")
        noise = moved(noise, self.device, non_blocking=True)
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        losses = {"l1": (images - decoded).abs().mean(), "kl": posterior.kl().sum() / images.numel()}
        total = losses["l1"] + self.config.kl_weight * losses["kl"]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(images, decoded).mean()
            total = total + self.config.perceptual_weight * losses["perceptual"]
        total.backward()
        norm = clip_gradients(self.vae, self.config.max_grad_norm)
        not_finite = ~(norm.isfinite() & total.detach().isfinite())
        step_unless(not_finite, self.optimizer)
        self.optimizer.zero_grad()
        average(list(self.ema.parameters()), list(self.vae.parameters()), self.step, self.config.ema_decay)
        self.bad_steps = torch.where(not_finite, self.bad_steps + 1, 0)
        return {name: value.detach() for name, value in losses.items()}

    def _report(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Waits for the device. Raises `FloatingPointError` if too many steps were skipped."""
        bad = int(self.bad_steps)
        if bad:
            logger.warning("step %d: loss or gradient is not finite; %d step(s) in a row were skipped", self.step, bad)
        half = self.step == self.config.steps and 2 * bad >= self.step
        if bad >= self.config.max_bad_steps or half:
            last = [str(path) for path in self.checkpoints.paths()[-1:]] or ["none"]
            raise FloatingPointError(
                f"the last {bad} steps up to step {self.step} had a loss or gradient that is not finite; their updates "
                f"were skipped. Lower learning_rate ({self.config.learning_rate}). Last checkpoint: {last[0]}"
            )
        return {name: float(f"{value.item():.4g}") for name, value in losses.items()}

    def _batches(self, step: int) -> Iterator[Tensor]:
        """Batches of `step`, `step` + 1, ...: images in a new random order each epoch, the next one read ahead."""
        with ThreadPoolExecutor(1, "images", torch.set_num_threads, (1,)) as pool:
            ahead = pool.submit(self._batch, step)
            while True:
                batch, step = ahead.result(), step + 1
                ahead = pool.submit(self._batch, step)
                yield batch

    def _batch(self, step: int) -> Tensor:
        places = range(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        return torch.stack([self._image(place) for place in places])

    def _image(self, place: int) -> Tensor:
        epoch, index = divmod(place, len(self.images))
        if epoch != self._epoch:
            generator = seeded(self.config.seed, "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator, device="cpu")
        for offset in range(len(self.images)):
            number = int(self._order[(index + offset) % len(self._order)])
            try:
                return to_tensor(self.images[number].image, self.config.image_size)
            except SampleError as error:
                if error.name not in self.skipped:
                    self.skipped[error.name] = error.reason
                    logger.warning("skipped %s", error)
        raise ValueError(f"none of the {len(self.images)} images can be read; the last: {self.images.names[number]}")

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        tensors = {f"vae.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, parameter in self.vae.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def _resume(self) -> None:
        record = self.checkpoints.load_last(self._tensors())
        self.step = record["step"] if record else 0

    def _save(self) -> None:
        self.checkpoints.save(self.step, self._tensors(), {})
        originals = torch.stack([self._image(place) for place in range(min(16, len(self.images)))])
        write_sheet(self.out / _SHEET, originals, self.kept, self.device)

    @property
    def kept(self) -> Any:
        """The network to write at the end: the average, or the last weights without one."""
        return self.ema if self.config.ema_decay else self.vae

    def _write(self) -> None:
        """Measures the latents, then writes weights and config, the config last: a folder that has it is complete."""
        count = min(_MEASURED, len(self.images))
        latents = torch.cat([_mode(self.kept, self._image(place)[None].to(self.device)) for place in range(count)])
        self.kept.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        aside = self.out / "writing.tmp"
        self.kept.save_pretrained(aside)
        for name in (_WEIGHTS, "config.json"):
            os.replace(aside / name, self.out / name)
        shutil.rmtree(aside)


def make_autoencoder_kl(config: AutoencoderConfig) -> Any:
    """diffusers' AutoencoderKL of this shape, with fresh weights."""
    levels, groups = len(config.channels), 32
    while any(width % groups for width in config.channels):
        groups //= 2
    return require("diffusers").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=groups,
        sample_size=config.image_size,
    )


@torch.no_grad()
def _mode(vae: Any, images: Tensor) -> Tensor:
    latents: Tensor = vae.encode(images).latent_dist.mode()
    return latents


@torch.no_grad()
def write_sheet(path: Path, originals: Tensor, vae: Any, device: torch.device | str) -> None:
    """A PNG of the originals (I, 3, H, W), eight in a row, and below each row what the autoencoder makes of it."""
    decoded = torch.cat([vae.decode(_mode(vae, image[None].to(device))).sample.cpu() for image in originals])
    rows = [part for pair in zip(originals.split(8), decoded.split(8), strict=True) for part in pair]
    blank = torch.ones(8, *originals.shape[1:], device="cpu")
    sheet = torch.cat([torch.cat([row, blank])[:8] for row in rows])
    aside = path.with_suffix(".tmp.png")
    require("PIL.Image").fromarray(contact_sheet(sheet)).save(aside)
    os.replace(aside, path)


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings in `out`. Raises `ValueError` if it holds a training with others; images may change."""
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    file = out / _SETTINGS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
    old, new = ({**each, **each["config"], "config": None, "images": None} for each in (before, settings))
    changed = [f"{name} {old.get(name)}, now {new.get(name)}" for name in new if old.get(name) != new.get(name)]
    if changed:
        what = "; ".join(changed)
        raise ValueError(f"{out} holds the training of another autoencoder ({what}); give another directory")
    if (there := before["images"]) != (now := settings["images"]):
        logger.warning("%s: it had %s images and has %s now: their order is another from here on", out, there, now)
    write_whole(file, json.dumps(settings, indent=2) + "\n")
