"""`RunConfig`, everything that determines a run: what it may begin with, and what may change when it is resumed."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transfusion import config as configs
from transfusion import presets, recipes
from transfusion.config import ModelConfig
from transfusion.data import DataConfig, Tokenizer
from transfusion.data.config import absolute
from transfusion.generation.pipeline import CONFIG as PIPELINE
from transfusion.generation.pipeline import VAE
from transfusion.model.pretrained import local_folder
from transfusion.training import TrainConfig

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, MODEL = "config.toml", "tokenizer.json", "model"
_LOSS_WEIGHT = "image_loss_weight"  # the one field of a network that its weights do not depend on

# What may change when a run is resumed: its length, how a step is divided and what is logged, but not what is learned,
# or from what data.
LENGTH = ("steps", "warmup_steps")
_FREE = (
    *(f"train.{name}" for name in LENGTH),
    "data.loader.rows",
    "data.loader.workers",
    "train.accumulation",
    "train.parallel",
    "train.log_every",
    "train.checkpoint_every",
    "train.async_checkpoint",
    "train.preview_every",
    "train.keep_checkpoints",
    "train.timestep_bins",
    "train.peak_tflops",
    "train.wandb_project",
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Args:
        model: the network.
        data: where samples come from.
        train: how the network is trained.
        seed: of the initial weights.
        init: a saved pipeline to start from instead: its folder, such as runs/old/model, the name of one that comes
            with the package, or OWNER/NAME on the Hugging Face hub. Its network and its tokenizer are the run's.
    """

    model: ModelConfig = field(default_factory=lambda: presets.get("tiny"))
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    init: str = ""

    def __post_init__(self) -> None:
        if self.data.loader.patch_size != self.model.patch_size:
            raise ValueError(
                f"data.loader.patch_size {self.data.loader.patch_size} differs from "
                f"model.patch_size {self.model.patch_size}: give both, --model.patch-size and --data.loader.patch-size"
            )
        if self.model.codec == "unet" and self.data.loader.aspect_ratios:
            raise ValueError(
                "model.codec 'unet' takes images of one size in a batch, and data.loader.aspect_ratios makes them "
                "differ: give --model.codec linear, or no aspect ratios"
            )


def with_saved_model(config: RunConfig, said: Mapping[str, Any] | None = None) -> RunConfig:
    """`config` with the network and the autoencoder of `config.init`.

    said: what the user's TOML names. Its autoencoder and image_loss_weight are kept; if it names another network, a
    warning says so.
    """
    folder, data, said = saved_pipeline(config.init), config.data, said or {}
    model, named = configs.load(ModelConfig, folder / CONFIG), said.get("model", {})
    if _LOSS_WEIGHT in named:
        model = replace(model, image_loss_weight=config.model.image_loss_weight)
    others = [f"model.{name}" for name in named if getattr(config.model, name) != getattr(model, name)]
    if others:
        logger.warning("init %s: its network takes the place of the config's (%s)", config.init, ", ".join(others))
    if "autoencoder" not in said.get("data", {}):
        data = replace(data, autoencoder=str(folder / VAE) if (folder / VAE).is_dir() else "pixels")
    loader = replace(data.loader, patch_size=model.patch_size)
    return replace(config, model=model, data=replace(data, loader=loader))


def saved_pipeline(init: str) -> Path:
    """The folder that `RunConfig.init` names. Raises `FileNotFoundError` if there is none."""
    folder = local_folder(init)
    if not (folder / PIPELINE).is_file():
        raise FileNotFoundError(
            f"init {init}: {folder} is no saved pipeline, it has no {PIPELINE}; give the {MODEL}/ of a run that has "
            f"finished, OWNER/NAME on the Hugging Face hub, or {' or '.join(recipes.trained())}"
        )
    return folder


def from_anywhere(config: RunConfig) -> RunConfig:
    """The same config with absolute paths, so that it means the same from any directory."""
    init = str(Path(config.init).absolute()) if config.init and Path(config.init).exists() else config.init
    return replace(config, data=absolute(config.data), init=init)


def saved_tokenizer(config: RunConfig) -> Tokenizer:
    """That of `config.init`. Raises `ValueError` where the network there is another than the config's."""
    saved = configs.load(ModelConfig, saved_pipeline(config.init) / CONFIG)
    weighted = replace(saved, image_loss_weight=config.model.image_loss_weight)
    changed = differences(configs.to_dict(weighted), configs.to_dict(config.model), "model.")
    if changed:
        raise ValueError(f"the network of init {config.init} cannot be changed ({'; '.join(changed)})")
    return Tokenizer.load(saved_pipeline(config.init) / TOKENIZER)


def differences(old: dict[str, object], new: dict[str, object], where: str = "") -> list[str]:
    """`key: old value, now new value` for each leaf that differs."""
    result = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if f"{where}{key}" in _FREE:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            result += differences(before, now, f"{where}{key}.")
        elif before != now:
            result.append(f"{where}{key}: {before}, now {now}")
    return result
