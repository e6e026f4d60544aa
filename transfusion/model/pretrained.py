"""A model is a folder: `config.toml`, `model.safetensors`. What is written is read, or an error says why not."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from transfusion import config as configs
from transfusion.config import ModelConfig

if TYPE_CHECKING:
    from transfusion.model.transfusion import Transfusion

CONFIG, WEIGHTS = "config.toml", "model.safetensors"


def save(model: "Transfusion", path: str | Path) -> None:
    """Writes the model's folder, each file aside and then renamed: a failed write leaves what was there."""
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{WEIGHTS}.tmp"
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, aside)
        configs.save(model.config, folder / f"{CONFIG}.tmp")
        os.replace(aside, folder / WEIGHTS)
        os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)
    finally:
        aside.unlink(missing_ok=True)


def load(path: str | Path, device: torch.device | str = "cpu") -> "Transfusion":
    """The model in folder `path`, on `device`. Raises `FileNotFoundError` or `ValueError` naming the file at fault."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from transfusion.model.transfusion import Transfusion

    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a saved model: it has no {name}")
    with torch.device("meta"):
        model = Transfusion(configs.load(ModelConfig, folder / CONFIG))
    try:
        weights = load_file(folder / WEIGHTS, device=str(device))
        model.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated, or not of this config: {error}") from error
    return model
