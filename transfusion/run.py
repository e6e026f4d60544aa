"""A run is a folder: config.toml, tokenizer.json, checkpoints/, log.jsonl, tensorboard/, and model/ at the end.

Run.start(config, directory).train()     starts the run, or goes on with the one that is there
Run.open(directory)                      what evaluation and sampling work on
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transfusion import config as configs
from transfusion import presets
from transfusion.config import ModelConfig
from transfusion.data import (
    Autoencoder,
    DiffusersAutoencoder,
    EmojiSource,
    FolderSource,
    ImageSource,
    Loader,
    LoaderConfig,
    PixelAutoencoder,
    PydocTextSource,
    TextFolderSource,
    TextSource,
    Tokenizer,
)
from transfusion.data.documents import caption_image_length
from transfusion.data.sources import Split
from transfusion.evaluation import image_figures, read_images, text_figures
from transfusion.generation import TransfusionPipeline
from transfusion.model import Transfusion
from transfusion.sequence import image_tokens
from transfusion.training import TrainConfig, Trainer
from transfusion.training.trainer import Preview

CONFIG, TOKENIZER, MODEL = "config.toml", "tokenizer.json", "model"


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from, and how they become batches.

    Args:
        images: "emoji:demo", "emoji:all", a folder with captions.jsonl, or "" for none.
        texts: "pydoc" (Python's own reference manual), a folder of .txt files, or "" for none.
        autoencoder: "pixels" (latents are pixels in [-1, 1]) or a diffusers AutoencoderKL, local folder or hub name.
        loader: how samples become batches.
    """

    images: str = "emoji:demo"
    texts: str = "pydoc"
    autoencoder: str = "pixels"
    loader: LoaderConfig = field(
        default_factory=lambda: LoaderConfig(rows=20, row_length=108, image_size=32, patch_size=8)
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Args:
        model: the network.
        data: where samples come from.
        train: how the network is trained.
        seed: of the initial weights.
    """

    model: ModelConfig = field(default_factory=lambda: presets.get("tiny"))
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data.loader.patch_size != self.model.patch_size:
            raise ValueError(
                f"data.loader.patch_size {self.data.loader.patch_size} differs from "
                f"model.patch_size {self.model.patch_size}"
            )


def image_source(data: DataConfig, split: Split) -> ImageSource | None:
    """The captioned images that `data.images` names. Raises `ValueError` where there are none."""
    if not data.images:
        return None
    if data.images in ("emoji:demo", "emoji:all"):
        return EmojiSource(data.loader.image_size, split, "demo" if data.images == "emoji:demo" else "all")
    return FolderSource(Path(data.images), split)


def text_source(data: DataConfig, split: Split) -> TextSource | None:
    """The texts that `data.texts` names. Raises `ValueError` where there are none."""
    if not data.texts:
        return None
    return PydocTextSource(split) if data.texts == "pydoc" else TextFolderSource(Path(data.texts), split)


def train_tokenizer(config: RunConfig) -> Tokenizer:
    """A byte-level BPE of the run's own captions and texts."""
    images, texts = image_source(config.data, "train"), text_source(config.data, "train")
    corpus = [texts[index] for index in range(len(texts))] if texts else []
    return Tokenizer.train([*corpus, *(images.captions if images else [])], config.model.vocab_size)


class Run:
    """A run's folder and what is in it."""

    def __init__(self, directory: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
        self.directory, self.config, self.tokenizer = directory, config, tokenizer

    @staticmethod
    def start(config: RunConfig, directory: Path) -> "Run":
        """The run in `directory`, begun where there is none. Raises `ValueError` where its config is another one."""
        if (directory / CONFIG).is_file():
            run = Run.open(directory)
            changed = _differences(configs.to_dict(run.config), configs.to_dict(config))
            if changed:
                raise ValueError(
                    f"{directory} holds a run with another config ({'; '.join(changed)}); "
                    "give another directory, or delete it"
                )
            return run
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(config)
        tokenizer.save(directory / TOKENIZER)
        configs.save(config, directory / CONFIG)  # last: a folder with a config is a whole run
        return Run(directory, config, tokenizer)

    @staticmethod
    def open(directory: Path) -> "Run":
        """The run in `directory`. Raises `FileNotFoundError` where there is none."""
        if not (directory / CONFIG).is_file():
            raise FileNotFoundError(f"{directory} holds no run: it has no {CONFIG}; start one with `transfusion train`")
        config = configs.load(RunConfig, directory / CONFIG)
        return Run(directory, config, Tokenizer.load(directory / TOKENIZER))

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """Pixels to latents and back."""
        name = self.config.data.autoencoder
        return PixelAutoencoder() if name == "pixels" else DiffusersAutoencoder(name)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image."""
        side = self.config.data.loader.image_size // self.autoencoder.downscale
        return (self.config.model.latent_channels, side, side)

    def train(self, device: torch.device | str = "cpu", preview: Preview | None = None) -> bool:
        """Trains to the last step, then writes model/ with the averaged weights. -> False where it was stopped."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = Transfusion(self.config.model).to(device)
        data = self.config.data
        loader = Loader(
            data.loader, self.tokenizer, image_source(data, "train"), text_source(data, "train"), self.autoencoder
        )
        trainer = Trainer(model, loader, self.config.train, self.directory, preview)
        finished = trainer.run()
        if finished:
            trainer.ema.save_pretrained(self.directory / MODEL)
        return finished

    def model(self, device: torch.device | str = "cpu") -> Transfusion:
        """The trained model. Raises `FileNotFoundError` where the run has not ended yet."""
        return Transfusion.from_pretrained(self.directory / MODEL, device).eval()

    def evaluate(self, model: Transfusion, draws: int = 8, seed: int = 0) -> dict[str, Any]:
        """The figures of `metrics.json`: text (held out), images of the training and of the held-out split.

        draws: timesteps, with fresh noise, that each image is judged at; they are spread evenly over the path.
        """
        data = self.config.data
        figures: dict[str, Any] = {"parameters": model.num_parameters()}
        texts = text_source(data, "test")
        if texts is not None:
            figures["text_held_out"] = text_figures(model, self.tokenizer, texts, data.loader.row_length)
        beside = caption_image_length(0, image_tokens(self.latent_shape, data.loader.patch_size))
        limit = data.loader.row_length - beside
        splits: tuple[tuple[Split, str], ...] = (("train", "images_train"), ("test", "images_held_out"))
        for split, name in splits:
            images = image_source(data, split)
            if images is not None:
                size = data.loader.image_size
                captions, latents, skipped = read_images(images, self.tokenizer, self.autoencoder, size, limit)
                figures[name] = image_figures(model, captions, latents, draws, seed) | {"skipped": skipped}
        return figures

    def pipeline(self, model: Transfusion) -> TransfusionPipeline:
        """Captions, pictures and texts in and out of `model`, this run's or one of its previews."""
        return TransfusionPipeline(model, self.tokenizer, self.autoencoder, self.latent_shape)


def _differences(old: dict[str, object], new: dict[str, object], where: str = "") -> list[str]:
    """`key: old value, now new value` for each leaf that differs."""
    result = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            result += _differences(before, now, f"{where}{key}.")
        elif before != now:
            result.append(f"{where}{key}: {before}, now {now}")
    return result
