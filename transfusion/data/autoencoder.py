"""Images in [-1, 1] <-> the latents that are noised: the pixels themselves, or a VAE of diffusers."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from transfusion.data.optional import require


class Autoencoder(Protocol):
    """Two maps: images (I, 3, H, W) in [-1, 1] and latents (I, latent_channels, H/downscale, W/downscale) float32."""

    latent_channels: int
    downscale: int

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """-> the most likely latents, or a sample of them from `generator`."""

    def decode(self, latents: Tensor) -> Tensor:
        """-> images clamped to [-1, 1]."""


def _check_images(images: Tensor, downscale: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape (I, 3, H, W), got {tuple(images.shape)}")
    if images.shape[2] % downscale or images.shape[3] % downscale:
        raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} do not divide by the downscale {downscale}")


class PixelAutoencoder:
    """latent = image: diffusion on the pixels themselves."""

    latent_channels = 3
    downscale = 1

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images (I, 3, H, W) in [-1, 1] -> the same as float32; nothing is random here."""
        _check_images(images, self.downscale)
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """latents (I, 3, H, W) -> images clamped to [-1, 1]."""
        return latents.float().clamp(-1, 1)


class DiffusersAutoencoder:
    """latent = scaling_factor·(VAE(image) - shift_factor) with diffusers' `AutoencoderKL`.

    `name_or_path`: a folder saved by `save_pretrained`, or a name on the Hugging Face hub. The VAE is frozen.
    Latents come back float32 on the images' device; the VAE computes in `dtype` on `device`.
    """

    def __init__(
        self, name_or_path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        vae: Any = require("diffusers").AutoencoderKL.from_pretrained(str(name_or_path))
        self._vae = vae.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.latent_channels = int(vae.config.latent_channels)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._scale = float(vae.config.scaling_factor)
        self._shift = float(vae.config.shift_factor or 0.0)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images (I, 3, H, W) in [-1, 1] -> latents: the mode, or a sample from `generator`."""
        _check_images(images, self.downscale)
        posterior = self._vae.encode(images.to(self._vae.device, self._vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return ((latents.float() - self._shift) * self._scale).to(images.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (I, C, h, w) -> images (I, 3, H, W) float32, clamped to [-1, 1]."""
        unscaled = latents.float() / self._scale + self._shift
        images = self._vae.decode(unscaled.to(self._vae.device, self._vae.dtype)).sample
        return images.float().clamp(-1, 1).to(latents.device)
