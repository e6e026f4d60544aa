"""Images in [-1, 1] <-> the latents that are noised: the pixels themselves, or a VAE of diffusers."""

import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from transfusion.optional import require


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
    encode(images, g) == latents(moments(images), g), so that moments can be computed once and kept.
    """

    def __init__(
        self, name_or_path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        # low_cpu_mem_usage would need the package accelerate, and says so at length
        options: dict[str, Any] = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
        try:
            vae: Any = require("diffusers").AutoencoderKL.from_pretrained(str(name_or_path), **options)
        except OSError as error:
            raise ValueError(
                f"autoencoder {str(name_or_path)!r} is neither the folder of an AutoencoderKL nor a name that the "
                f"Hugging Face hub gives here: {error}"
            ) from error
        self._vae = vae.to(device).eval().requires_grad_(False)
        self.latent_channels = int(vae.config.latent_channels)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._scale = float(vae.config.scaling_factor)
        self._shift = float(vae.config.shift_factor or 0.0)

    @property
    def device(self) -> torch.device:
        """Where the VAE computes."""
        device: torch.device = self._vae.device
        return device

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the encoder's weights and their dtype: autoencoders with the same fingerprint give the same
        moments."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._vae.state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """images (I, 3, H, W) in [-1, 1] -> (I, 2C, h, w): mean and log variance of the latents, not scaled yet."""
        _check_images(images, self.downscale)
        posterior = self._vae.encode(images.to(self.device, self._vae.dtype)).latent_dist
        moments: Tensor = posterior.parameters
        return moments.to(images.device)

    def latents(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """moments (I, 2C, h, w) -> scaled latents: the mode, or a sample from `generator`."""
        gaussian = require("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution(moments)
        latents = gaussian.mode() if generator is None else gaussian.sample(generator)
        scaled: Tensor = (latents.float() - self._shift) * self._scale
        return scaled

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images (I, 3, H, W) in [-1, 1] -> latents: the mode, or a sample from `generator`."""
        return self.latents(self.moments(images), generator)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the folder `path`, which `DiffusersAutoencoder(path)` reads."""
        self._vae.save_pretrained(str(path))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (I, C, h, w) -> images (I, 3, H, W) float32, clamped to [-1, 1]."""
        unscaled = latents.float() / self._scale + self._shift
        images = self._vae.decode(unscaled.to(self.device, self._vae.dtype)).sample
        return images.float().clamp(-1, 1).to(latents.device)
