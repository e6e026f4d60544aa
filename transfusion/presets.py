"""The paper's five sizes (arXiv 2408.11039, table 2) and `tiny`, which a CPU trains in minutes."""

from dataclasses import replace

from transfusion.config import ModelConfig
from transfusion.diffusion.schedule import NoiseSchedule

PRESETS: dict[str, ModelConfig] = {
    # 8×8 patches of 32×32 pixels: 16 tokens an image. v-prediction learns few images in few steps.
    "tiny": ModelConfig(
        vocab_size=2048,
        dim=256,
        layers=4,
        heads=4,
        latent_channels=3,
        patch_size=8,
        schedule=NoiseSchedule("v_prediction"),
    ),
    "0.16b": ModelConfig(dim=768, layers=16, heads=12),
    "0.37b": ModelConfig(dim=1024, layers=24, heads=16),
    "0.76b": ModelConfig(dim=1536, layers=24, heads=24),
    "1.4b": ModelConfig(dim=2048, layers=24, heads=16),
    "7b": ModelConfig(dim=4096, layers=32, heads=32),
}


def get(name: str, **changes: object) -> ModelConfig:
    """The named preset with fields changed. Raises `ValueError` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
