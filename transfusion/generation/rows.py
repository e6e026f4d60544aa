"""Documents as the rows of one batch, and the network evaluated on all of them at once.

The one place where generation runs the network. Every evaluation computes the whole of every row anew.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from transfusion.kernels import patchify_noise
from transfusion.kernels.patchify_noise.reference import unpatchify
from transfusion.model import Transfusion
from transfusion.sequence import Document, Image, Text, collate, document_length


@contextmanager
def inference(model: Transfusion) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is restored afterwards, after an error too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def check_contexts(model: Transfusion, contexts: Sequence[Document]) -> None:
    """Raises `ValueError` unless each is a document so far: text that begins with BOS, then anything of the model's."""
    config = model.config
    if not len(contexts):
        raise ValueError("no contexts are given: generation needs at least one, such as (Text(torch.tensor([bos])),)")
    for index, context in enumerate(contexts):
        first = context[0] if len(context) else None
        if not isinstance(first, Text) or not len(first.token_ids) or first.token_ids[0] != config.special.bos:
            raise ValueError(
                f"context {index} must begin with a Text that begins with BOS ({config.special.bos}), "
                f"as documents do in training; it begins with {_describe(first)}"
            )
        for segment in context:
            if isinstance(segment, Image):
                check_latent_shape(model, segment.latent.shape)
            elif len(ids := segment.token_ids) and (ids.min() < 0 or ids.max() >= config.vocab_size):
                raise ValueError(
                    f"context {index} holds token ids {int(ids.min())}..{int(ids.max())}, outside the vocabulary "
                    f"of {config.vocab_size}; is the tokenizer the model's?"
                )


def _describe(segment: Text | Image | None) -> str:
    if isinstance(segment, Text):
        return f"tokens {segment.token_ids[:4].tolist()}"
    return "nothing" if segment is None else "an image"


def check_latent_shape(model: Transfusion, shape: Sequence[int]) -> None:
    """Raises `ValueError` unless `shape` is a (C, h, w) that the model's patches tile."""
    channels, patch = model.config.latent_channels, model.config.patch_size
    if len(shape) != 3 or shape[0] != channels or min(shape) < 1 or shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"a latent of shape {tuple(shape)} does not fit the model: it takes ({channels}, h, w) "
            f"with h and w multiples of its patch size {patch}"
        )


class Rows:
    """B documents side by side, each a row of its own, padded to the longest. Their images are clean: timestep 0."""

    def __init__(self, model: Transfusion, documents: Sequence[Document], impl: str = "auto") -> None:
        self.model, self.impl = model, impl
        config = model.config
        self.device = model.embedding.weight.device
        lengths = [document_length(document, config.patch_size) for document in documents]
        rows = [[document] for document in documents]
        # collate draws noising times and a seed, which no one reads here
        batch = collate(rows, max(lengths), config.patch_size, config.special, torch.Generator())
        self.batch = batch.to(self.device)
        self.last_position = torch.tensor(lengths, device=self.device) - 1
        images = [sum(isinstance(segment, Image) for segment in document) for document in documents]
        self.last_image = torch.tensor(images, device=self.device).cumsum(0) - 1  # of each row that has one
        self.clean = torch.zeros(batch.num_images, dtype=self._timestep_dtype(), device=self.device)

    def _timestep_dtype(self) -> torch.dtype:
        return torch.int64 if self.model.config.schedule.path == "cosine" else torch.float32

    def next_token_logits(self) -> Tensor:
        """(B, vocab_size) float32: of the token that follows each row's last one."""
        hidden = self._hidden(self.batch.latents, self.clean)
        last = hidden[torch.arange(len(hidden), device=self.device), self.last_position]
        return self.model.head(last).float()

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The prediction (B, C, h, w) float32 for the last image of each row, where that image is `latents`
        (B, C, h, w) at `timestep` (B,). Every document has at least one image; the earlier ones stay clean."""
        batch, patch = self.batch, self.model.config.patch_size
        mixed = batch.latents.index_copy(0, self.last_image, latents.to(batch.latents.dtype))
        hidden = self._hidden(mixed, self.clean.index_copy(0, self.last_image, timestep.to(self.clean.dtype)))
        positions = batch.image_rows.view(batch.num_images, -1)[self.last_image]
        decoded = self.model.codec.decode(hidden.flatten(0, 1)[positions])
        return unpatchify(decoded.float(), latents.shape, patch)

    def _hidden(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Hidden states (B, N, dim) with the images as they are: 1·latents + 0·latents is exact."""
        one = torch.ones(len(latents), device=self.device)
        dtype, patch = self.model.head.weight.dtype, self.model.config.patch_size
        patches = patchify_noise(latents, one, one - one, patch, noise=latents, dtype=dtype, impl=self.impl)
        batch = replace(self.batch, latents=latents)
        return self.model.hidden(batch, patches, timestep, self.impl)
