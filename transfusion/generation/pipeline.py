"""Strings and pictures in and out: a model with its tokenizer and autoencoder around it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion.data import Autoencoder, PixelAutoencoder, Tokenizer
from transfusion.diffusion.sampler import make_scheduler
from transfusion.generation.image import denoise
from transfusion.generation.text import generate_text
from transfusion.model import Transfusion
from transfusion.sequence import Image, Text


class TransfusionPipeline:
    """Images from captions, captions of images, continuations of texts.

    latent_shape: (C, h, w) of the images that the model was trained on.
    """

    def __init__(
        self, model: Transfusion, tokenizer: Tokenizer, autoencoder: Autoencoder, latent_shape: tuple[int, int, int]
    ) -> None:
        self.model, self.tokenizer, self.autoencoder = model, tokenizer, autoencoder
        self.latent_shape = latent_shape

    def images(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 50,
        guidance_scale: float = 3.0,
        scheduler: str | Any | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """Captions -> (I, 3, H, W) float32 in [-1, 1]. Image i starts from the noise of seed + i.

        scheduler: a name that `make_scheduler` knows, a diffusers scheduler, or None for the first that fits.
        Raises as `denoise` and `make_scheduler` do.
        """
        if isinstance(scheduler, str | None):
            in_pixels = isinstance(self.autoencoder, PixelAutoencoder) and scheduler in (None, "ddim", "ddpm")
            clips = in_pixels and self.model.config.schedule.path == "cosine"
            scheduler = make_scheduler(self.model.config.schedule, scheduler, clip_sample=clips)
        latents = denoise(
            self.model,
            [(self._text(prompt),) for prompt in prompts],
            self.latent_shape,
            scheduler=scheduler,
            steps=steps,
            seeds=[seed + index for index in range(len(prompts))],
            guidance_scale=guidance_scale,
            progress=progress,
        )
        return self.autoencoder.decode(latents)

    def captions(
        self, images: Tensor, *, max_new_tokens: int = 32, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """(I, 3, H, W) in [-1, 1] -> a caption of each; greedy by default, as in the paper."""
        latents = self.autoencoder.encode(images)
        contexts = [(self._text(""), Image(latent)) for latent in latents]
        seeds = [seed + index for index in range(len(contexts))]
        tokens = generate_text(
            self.model, contexts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds
        )
        return [self.tokenizer.decode(row).strip() for row in tokens]

    def continuations(
        self, texts: Sequence[str], *, max_new_tokens: int = 60, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model writes after each text."""
        contexts = [(self._text(text),) for text in texts]
        seeds = [seed + index for index in range(len(contexts))]
        tokens = generate_text(
            self.model, contexts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds
        )
        return [self.tokenizer.decode(row) for row in tokens]

    def _text(self, text: str) -> Text:
        bos = torch.tensor([self.tokenizer.special.bos])
        return Text(torch.cat([bos, self.tokenizer.encode(text)]))
