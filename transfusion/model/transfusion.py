"""L = L_LM + λ·L_DDPM: one transformer over text tokens and noised image patches (arXiv 2408.11039).

text   token_ids -> embedding ┐                 ┌ hidden[text_rows]  -> head  -> cross-entropy
                              ├-> transformer ->┤
image  patchify_noise -> codec┘      (mask)     └ hidden[image_rows] -> codec -> diffusion_loss
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from transfusion.config import ModelConfig
from transfusion.kernels import diffusion_loss, patchify_noise
from transfusion.model import pretrained
from transfusion.model.image_codec import LinearCodec
from transfusion.model.transformer import Transformer
from transfusion.sequence import Batch


class Losses(NamedTuple):
    """Scalars in float32: total = text + λ·image, text in nats per token, image the mean squared error; and the
    error of each image, (I,)."""

    total: Tensor
    text: Tensor
    image: Tensor
    per_image: Tensor


class Transfusion(nn.Module):
    """One transformer with next-token loss on text and diffusion loss on images. Builds on the meta device too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.codec = LinearCodec(config)
        self.transformer = Transformer(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights of standard deviation 0.02, those that close a residual branch divided by √(2·layers).

        GPT-2's; the paper is silent.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                closes_branch = name.endswith(("attention.out.weight", "ffn.down.weight"))
                parameter.normal_(std=0.02 / ((2 * self.config.layers) ** 0.5 if closes_branch else 1.0))

    def forward(self, batch: Batch, impl: str = "auto") -> Losses:
        """The losses of a batch: a pure function of it and of the weights, for its times and noise are in it.

        `impl` chooses the implementation of every kernel: "auto", "triton" or "reference".
        """
        schedule, patch = self.config.schedule, self.config.patch_size
        timestep = schedule.timestep(batch.times)
        path = schedule.coefficients(timestep)
        noised = patchify_noise(
            batch.latents, path.alpha, path.sigma, patch, seed=batch.noise_seed, dtype=self.head.weight.dtype, impl=impl
        )
        hidden = self.hidden(batch, noised, timestep, impl).flatten(0, 1)
        text = image = torch.zeros((), device=hidden.device)
        per_image = torch.zeros(0, device=hidden.device)
        if batch.text_rows.numel():
            text = functional.cross_entropy(self.head(hidden[batch.text_rows]).float(), batch.text_targets)
        if batch.num_images:
            prediction = self.codec.decode(hidden[batch.image_rows].unflatten(0, noised.shape[:2]))
            per_image = diffusion_loss(
                prediction, batch.latents, path.data_weight, path.noise_weight, patch, seed=batch.noise_seed, impl=impl
            )
            image = per_image.mean()
        return Losses(text + self.config.image_loss_weight * image, text, image, per_image)

    def hidden(self, batch: Batch, patches: Tensor, timestep: Tensor, impl: str = "auto") -> Tensor:
        """Patches (I, n, P·P·C) and their timestep (I,) in place among the batch's text -> hidden (B, N, dim)."""
        x = self.embedding(batch.token_ids)
        if batch.num_images:
            thousandths = timestep * (1000 / self.config.schedule.timestep_range)
            encoded = self.codec.encode(patches, thousandths).flatten(0, 1)
            x = x.flatten(0, 1).index_copy(0, batch.image_rows, encoded.to(x.dtype)).view_as(x)
        return self.transformer(x, batch.positions, batch.mask, impl)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the folder `path`: config.toml and model.safetensors."""
        pretrained.save(self, path)

    @staticmethod
    def from_pretrained(path: str | Path, device: torch.device | str = "cpu") -> "Transfusion":
        """The model saved in folder `path`. Raises `FileNotFoundError` or `ValueError` naming the file at fault."""
        return pretrained.load(path, device)

    def num_parameters(self) -> int:
        """Trainable numbers, on the meta device too."""
        return sum(parameter.numel() for parameter in self.parameters())
