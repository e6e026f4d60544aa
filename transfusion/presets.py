"""The paper's models (arXiv 2408.11039): each size with either codec, each codec with its patch sizes; and `tiny`.

0.16b  0.37b  0.76b  1.4b  7b           table 2; linear codec, 2×2 latents a token
0.16b-unet  ...  7b-unet                table 7; U-Net codec, 2×2
0.76b-1x1  0.76b-4x4  0.76b-8x8         table 6; linear codec, 1024, 64 and 16 tokens for 32×32 latents
0.76b-unet-4x4  0.76b-unet-8x8          table 6; U-Net codec
tiny                                    what a CPU trains in minutes
"""

from dataclasses import replace

from transfusion.config import ModelConfig, UNetConfig
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

# The paper says what the U-Net adds, 0.27B parameters (0.17B to the smallest model), not its widths: these add as much.
_UNETS = {2: UNetConfig(512, 1152), 4: UNetConfig(448, 832), 8: UNetConfig(320, 704)}
_SMALL_UNET = UNetConfig(448, 896)

PRESETS |= {
    f"{name}-unet": replace(PRESETS[name], codec="unet", unet=_SMALL_UNET if name == "0.16b" else _UNETS[2])
    for name in ("0.16b", "0.37b", "0.76b", "1.4b", "7b")
}
PRESETS |= {f"0.76b-{side}x{side}": replace(PRESETS["0.76b"], patch_size=side) for side in (1, 4, 8)}
PRESETS |= {
    f"0.76b-unet-{side}x{side}": replace(PRESETS["0.76b"], patch_size=side, codec="unet", unet=_UNETS[side])
    for side in (4, 8)
}


def get(name: str, **changes: object) -> ModelConfig:
    """The named preset with fields changed. Raises `ValueError` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
