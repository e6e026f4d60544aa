"""Config: TOML there and back, and every mistake named."""

from dataclasses import replace
from pathlib import Path

import pytest

from transfusion import config as configs
from transfusion import presets
from transfusion.config import ModelConfig
from transfusion.data import LoaderConfig
from transfusion.run import DataConfig, RunConfig
from transfusion.training import TrainConfig

CONFIG = RunConfig(
    presets.get("tiny", kv_heads=2),
    DataConfig("folder", "", "pixels", LoaderConfig(rows=3, images_per_row=None, patch_size=8)),
    replace(TrainConfig(), betas=(0.8, 0.9), precision="float32"),
)


def test_toml_there_and_back(tmp_path: Path) -> None:
    configs.save(CONFIG, tmp_path / "config.toml")
    assert configs.load(RunConfig, tmp_path / "config.toml") == CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dims = 3", "unknown key 'dims'; known here: vocab_size, dim"),
        ('dim = "3"', "dim must be int, got '3'"),
        ("dim = true", "dim must be int, got True"),
        ("schedule = 3", "schedule must be a table"),
        ("[schedule]\nprediction = 'x'", "schedule.prediction must be"),
        ("dim = 7", "does not split"),
        ("dim = ", "config.toml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.load(ModelConfig, path)


def test_whole_numbers_pass_for_floats() -> None:
    assert configs.from_dict(ModelConfig, {"rope_theta": 5}).rope_theta == 5.0


def test_patch_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"data\.loader\.patch_size 2 differs from model\.patch_size 8"):
        RunConfig(presets.get("tiny"), DataConfig(loader=LoaderConfig(rows=1)))
