"""Config: TOML there and back, and every mistake named."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from transfusion import config as configs
from transfusion import presets
from transfusion.config import ModelConfig, RopeScaling, UNetConfig
from transfusion.data import DataConfig, LoaderConfig
from transfusion.run_config import RunConfig
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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codec", "vqgan", "codec must be one of 'linear', 'unet', got 'vqgan'"),
        ("image_positions", "hilbert", "image_positions must be one of 'sequence', 'grid', got 'hilbert'"),
        ("dim", "x", "dim must be int, got 'x'"),
        ("layers", True, "layers must be int, got True"),
        ("kv_heads", 2.0, "kv_heads must be int | None, got 2.0"),
        ("schedule", "epsilon", "schedule must be NoiseSchedule, got 'epsilon'"),
        ("image_loss_weight", -5.0, "image_loss_weight must be positive and finite, got -5.0"),
        ("image_loss_weight", float("nan"), "image_loss_weight must be positive and finite, got nan"),
        ("rope_theta", float("inf"), "rope_theta must be positive and finite, got inf"),
        ("rope_theta", 0, "rope_theta must be positive and finite, got 0"),
        ("norm_eps", -1e-5, "norm_eps must be finite and not negative, got -1e-05"),
    ],
)
def test_a_preset_takes_no_value_that_its_field_does_not(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        presets.get("tiny", **{field: value})


def test_whole_numbers_pass_for_floats() -> None:
    assert configs.from_dict(ModelConfig, {"rope_theta": 5}).rope_theta == 5.0


def test_patch_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"data\.loader\.patch_size 2 differs from model\.patch_size 8"):
        RunConfig(presets.get("tiny"), DataConfig(loader=LoaderConfig(rows=1)))


def test_optional_tables_and_tables_in_tables(tmp_path: Path) -> None:
    unet, scaling = UNetConfig(width=16, deep_width=64, skips=False), RopeScaling(4.0)
    config = presets.get("0.76b-unet-8x8", unet=unet, rope_scaling=scaling, qk_norm=True, image_positions="grid")
    configs.save(config, tmp_path / "config.toml")
    assert configs.load(ModelConfig, tmp_path / "config.toml") == config


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_goes_through_toml(tmp_path: Path, name: str) -> None:
    configs.save(presets.get(name), tmp_path / "config.toml")
    assert configs.load(ModelConfig, tmp_path / "config.toml") == presets.get(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rope_scaling = 8.0", "rope_scaling must be a table, got 8.0"),
        ("[rope_scaling]\nfactor = 0.0", "rope_scaling: factor 0.0"),
        ("[rope_scaling]\nlow_freq_factor = 5.0", "0 < low_freq_factor < high_freq_factor, got 5.0 and 4.0"),
        ("[unet]\nwidths = 3", "unknown key 'unet.widths'"),
        ('codec = "vqgan"', "codec must be one of 'linear', 'unet', got 'vqgan'"),
        ('image_positions = "hilbert"', "image_positions must be one of 'sequence', 'grid', got 'hilbert'"),
        ('image_positions = "grid"\nheads = 128', "needs a head size that is a multiple of 4, got 6"),
        ("ffn_width = 0", "ffn_width must be at least 1, got 0"),
    ],
)
def test_mistakes_in_the_options_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.load(ModelConfig, path)


def test_betas_are_within_their_range() -> None:
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got \(0\.9, 1\.5\)"):
        replace(TrainConfig(), betas=(0.9, 1.5))


@pytest.mark.parametrize("peak", [-1.0, 0.0, float("nan")])
def test_a_peak_is_positive(peak: float) -> None:
    with pytest.raises(ValueError, match=f"peak_tflops must be positive and finite, got {peak}"):
        replace(TrainConfig(), peak_tflops=peak)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbfsteps = 7\nwarmup_steps = 1\n")
    assert configs.load(TrainConfig, tmp_path / "config.toml").steps == 7
