"""A model is a folder: `config.toml`, `model.safetensors`. What was saved is read, or an error says why not.

Weights of more than a shard's size are written as Hugging Face writes them: model-00001-of-00003.safetensors, ..., and
model.safetensors.index.json, which says which tensor is in which file.
"""

import importlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transfusion import config as configs
from transfusion import recipes
from transfusion.config import ModelConfig

if TYPE_CHECKING:
    from transfusion.model.transfusion import Transfusion

CONFIG, WEIGHTS, INDEX = "config.toml", "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes, Hugging Face's default
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def save(model: "Transfusion", path: str | Path, max_shard_size: int = SHARD) -> None:
    """Writes the model's folder, each file aside and then all renamed: a failed write leaves what was there."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shards = plan_shards({name: tensor.nbytes for name, tensor in state.items()}, max_shard_size)
    names = [*shards, CONFIG] if len(shards) == 1 else [*shards, INDEX, CONFIG]
    try:
        _write_shards(state, shards, folder)
        if len(shards) > 1:
            where = {name: file for file, members in shards.items() for name in members}
            total = sum(tensor.nbytes for tensor in state.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / f"{INDEX}.tmp").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        configs.save(model.config, folder / f"{CONFIG}.tmp")
        for name in names:
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in names:
            (folder / f"{name}.tmp").unlink(missing_ok=True)
    for old in folder.iterdir():  # of an earlier save in another number of files
        if old.name not in names and (old.name in (WEIGHTS, INDEX) or _SHARD_NAME.fullmatch(old.name)):
            old.unlink()


def plan_shards(sizes: Mapping[str, int], max_shard_size: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in order, from the bytes of each; a larger tensor has a file of its own."""
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": members for i, members in enumerate(shards, start=1)}


def _write_shards(state: Mapping[str, Tensor], shards: Mapping[str, list[str]], folder: Path) -> None:
    from safetensors.torch import save_file

    for file, members in shards.items():
        tensors = {name: state[name].cpu().contiguous() for name in members}
        save_file(tensors, folder / f"{file}.tmp", metadata={"format": "pt"})


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "Transfusion":
    """The model that `local_folder` finds, on `device`, its weights in `dtype`; None keeps the file's, except that
    float16 becomes float32 on a CPU, which computes in that.

    Raises `FileNotFoundError` or `ValueError` naming the file at fault, or a device that is not here; `TypeError` for
    another dtype than torch's.
    """
    from transfusion.model.transfusion import Transfusion

    check_device(device)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r} must be one of torch's, such as torch.bfloat16")
    folder = local_folder(path)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not a saved model: it has no {CONFIG}")
    with torch.device("meta"):
        model = Transfusion(configs.load(ModelConfig, folder / CONFIG))
    weights = read_weights(folder, device)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} are not of the model in its {CONFIG}: {error}") from error
    if dtype is None and torch.device(device).type == "cpu" and model.head.weight.dtype == torch.float16:
        dtype = torch.float32
    return model if dtype is None else model.to(dtype)


def check_device(given: torch.device | str) -> None:
    """Raises `ValueError` if torch has no such device here, or no module for it; "meta" holds no numbers."""
    try:
        device = torch.device(given)
        module = torch.get_device_module(device)
    except RuntimeError as error:
        raise ValueError(f"device {str(given)!r} is unknown; give cpu, cuda or cuda:N") from error
    count = module.device_count() if module.is_available() else 0
    if (device.index or 0) >= count:
        found = f"torch finds {count} {device.type} device(s) here" if count else f"torch finds no {device.type} here"
        raise ValueError(f"device {str(given)!r}: {found}; give another one (`transfusion doctor` lists them)")


def read_weights(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor in the safetensors of `folder`, one file or shards.

    Raises `FileNotFoundError` for a file that is missing, `ValueError` for one that is truncated or lacks a tensor.
    """
    if (folder / INDEX).is_file():
        try:
            where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / INDEX} is no index of shards: {error!r}") from error
        weights: dict[str, Tensor] = {}
        for file in dict.fromkeys(where.values()):
            weights |= _read_file(folder / file, device)
        lost = sorted(where.keys() - weights.keys())
        if lost:
            raise ValueError(f"{folder / where[lost[0]]} lacks {lost[0]}, which {INDEX} says it holds")
        return weights
    return _read_file(folder / WEIGHTS, device)


def _read_file(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a saved model: it has no {path.name}")
    try:
        weights = load_file(path, device=str(device))
        # On a CPU these are views of the mapped file, at any address, where products may round differently than for the
        # model that was saved. Their own memory also outlives the file.
        return {name: weight.clone() if weight.device.type == "cpu" else weight for name, weight in weights.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from error


def local_folder(source: str | Path) -> Path:
    """The folder `source`, or the model that comes with the package under that name.

    A string OWNER/NAME that is no local folder is fetched from the hub into its cache.
    """
    if Path(source).exists():
        return Path(source)
    if str(source) in recipes.trained():
        return recipes.trained()[str(source)]
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source):
        return Path(source)
    wanted = ["*.toml", "*.json", "*.safetensors"]
    return Path(_hub(f"fetch {source}").snapshot_download(source, allow_patterns=wanted))


def push(model: "Transfusion", repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Creates OWNER/NAME on the Hugging Face hub if need be, and uploads the model's folder -> its address."""
    hub = _hub(f"push to {repo_id}")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        # shards of an earlier push with another number of files would be read with these
        old = ["model*.safetensors", INDEX]
        api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=old, commit_message="Upload the model")
    return str(address)


def _hub(purpose: str) -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(f"huggingface_hub is needed to {purpose}: pip install huggingface_hub") from error
