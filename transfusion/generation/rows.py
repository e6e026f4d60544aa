"""Documents as the rows of one batch, each of its own length: the one place where generation runs the network.

    start(documents) -> next(token) -> next(token) -> Denoiser(latents, t), many times -> commit(clean latents) -> ...

No committed token is evaluated again: its keys and values are in the cache.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from transfusion.generation.cache import KVCache, Pair, Window
from transfusion.generation.graphs import Replayed
from transfusion.kernels import IntervalMask
from transfusion.kernels.patchify_noise.reference import patchify, unpatchify
from transfusion.model import Transfusion
from transfusion.model.positions import one_image_on_grid
from transfusion.model.unet_codec import Skips
from transfusion.sequence import Document, Image, collate, document_length, image_tokens

_LOCK = threading.Lock()
_RUNNING: dict[Transfusion, tuple[int, list[tuple[torch.nn.Module, bool]]]] = {}  # calls under way, and modes before


@contextmanager
def inference(model: Transfusion) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is restored afterwards, after an error too.

    With calls in several threads, the first to enter sets the mode and the last to leave restores it.
    """
    with _LOCK:
        count, modes = _RUNNING.get(model, (0, []))
        if not count:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _RUNNING[model] = count + 1, modes
    try:
        with torch.no_grad():
            yield
    finally:
        with _LOCK:
            count, modes = _RUNNING[model]
            _RUNNING[model] = count - 1, modes
            if count == 1:
                del _RUNNING[model]
                for module, training in modes:
                    module.training = training


def patches_of(model: Transfusion, latents: Tensor | Sequence[Tensor]) -> Tensor:
    """Latents (I, C, h, w) as they are -> what the model's codec reads, patches (I, n, P·P·C) of the linear one, in the
    weights' dtype; of a list of latents (C, h, w) that may differ in size, (T, P·P·C)."""
    patch, dtype = model.config.codec_window, model.head.weight.dtype
    if isinstance(latents, Tensor):
        return patchify(latents, patch).to(dtype)
    return torch.cat([patchify(latent[None], patch)[0] for latent in latents]).to(dtype)


def no_time(model: Transfusion, images: int, device: torch.device) -> Tensor:
    """(I,) zeros, the timestep of clean images, of the kind that the model's schedule has."""
    whole = model.config.schedule.path == "cosine"
    return torch.zeros(images, dtype=torch.int64 if whole else torch.float32, device=device)


def full_hidden(
    model: Transfusion, documents: Sequence[Document], impl: str, cache: KVCache | None = None
) -> tuple[Tensor, list[int]]:
    """Every token of every document at once -> hidden (B, N, dim), padded to the longest, and the documents' lengths.

    Their images are clean: timestep 0. An empty cache takes the keys and values in.
    """
    config, device = model.config, model.embedding.weight.device
    lengths = [document_length(document, config.patch_size) for document in documents]
    # collate draws noising times and a seed, which no one reads here
    rows = [[document] for document in documents]
    batch = collate(rows, max(lengths), config.patch_size, config.special, torch.Generator()).to(device)
    window = None if cache is None else cache.window(batch.mask)
    clean = no_time(model, batch.num_images, device)
    latents = [
        segment.latent.to(device) for document in documents for segment in document if isinstance(segment, Image)
    ]
    alike = len({latent.shape for latent in latents}) == 1
    patches = (
        patches_of(model, torch.stack(latents) if alike else latents) if latents else torch.empty(0, device=device)
    )
    hidden = model.hidden(batch, patches, clean, impl, window)
    if cache is not None:
        cache.advance(lengths)
    return hidden, lengths


def encode(model: Transfusion, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Skips | None]:
    """Latents (I, C, h, w), noised to their timestep (I,) -> the tokens (I, n, dim) that the transformer reads, and
    what `Transfusion.decode_images` needs."""
    return model.encode_images(patches_of(model, latents), timestep, latents.shape[-2:])


def positions_of(model: Transfusion, window: Window | Pair, latents: Tensor) -> Tensor:
    """Of new tokens that begin with the image `latents`: their places in the document, or on the image's grid."""
    if model.config.image_positions == "sequence":
        return window.positions
    patch = model.config.patch_size
    return one_image_on_grid(window.positions, image_tokens(latents.shape, patch), latents.shape[-1] // patch)


def logits_of(model: Transfusion, hidden: Tensor) -> Tensor:
    """(B, dim) -> (B, vocab_size) float32, of float64 weights float64: log-probabilities come from them."""
    logits: Tensor = model.head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Rows:
    """B documents of different lengths, with the keys and values of all their tokens."""

    def __init__(self, model: Transfusion, cache: KVCache, impl: str = "auto") -> None:
        self.model, self.cache, self.impl = model, cache, impl
        self._step, self._one = Replayed(), IntervalMask.causal(1, cache.lengths.device)

    @staticmethod
    def start(
        model: Transfusion, documents: Sequence[Document], capacity: int, impl: str = "auto"
    ) -> tuple["Rows", Tensor]:
        """Reads the documents -> their rows, with room for `capacity` tokens each, and the logits of what follows."""
        cache = KVCache.of(model, len(documents), capacity)
        hidden, lengths = full_hidden(model, documents, impl, cache)
        last = hidden[torch.arange(len(hidden), device="cpu"), torch.tensor(lengths, device="cpu") - 1]
        return Rows(model, cache, impl), logits_of(model, last)

    def next(self, token_ids: Tensor, going: Sequence[int] | None = None) -> Tensor:
        """Appends one token (B,) to every row -> the logits (B, vocab_size) of the one after it.

        going: the rows that it stays in, and that it is of; the others rest where they are.
        """
        self.cache.check_room(1)  # which a replayed graph could not
        logits = self._step(self._logits_after, token_ids.to(self.device))
        staying = range(len(self)) if going is None else set(going)
        self.cache.advance([int(row in staying) for row in range(len(self))])
        return logits

    def _logits_after(self, token_ids: Tensor) -> Tensor:
        window = Window(self.cache, self._one)
        hidden = self._transformer(self.model.embedding(token_ids)[:, None], window, window.positions)
        return logits_of(self.model, hidden[:, 0])

    def commit(self, latents: Tensor) -> Tensor:
        """Appends a clean image (B, C, h, w), after BOI, and EOI to every row -> the logits of what follows."""
        special, device = self.model.config.special, self.device
        image, _ = encode(self.model, latents, no_time(self.model, len(latents), device))
        tokens = image.shape[1]
        end = self.model.embedding(torch.full((len(latents), 1), special.eoi, device=device))
        window = self.cache.window(IntervalMask.from_spans(tokens + 1, [(0, tokens)], device=device))
        hidden = self._transformer(torch.cat([image, end], dim=1), window, positions_of(self.model, window, latents))
        self.cache.advance([tokens + 1] * len(self))
        return logits_of(self.model, hidden[:, -1])

    def _transformer(self, x: Tensor, window: Window, positions: Tensor) -> Tensor:
        hidden: Tensor = self.model.transformer(x, positions, window.new, self.impl, window)
        return hidden

    def take(self, rows: Sequence[int]) -> "Rows":
        """A copy of these rows, in this order."""
        return Rows(self.model, self.cache.take(rows), self.impl)

    @staticmethod
    def stack(rows: Sequence["Rows"]) -> "Rows":
        """The rows of several as one."""
        if len(rows) == 1:
            return rows[0]
        return Rows(rows[0].model, KVCache.stack([each.cache for each in rows]), rows[0].impl)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.cache.lengths.device

    def __len__(self) -> int:
        """B."""
        return len(self.cache.used)


class Denoiser:
    """What the network predicts about one new image of each row, which BOI has announced.

    Only the image's own tokens run, against the keys and values of what came before. `twins`: as many rows of the
    unconditional document, evaluated in the same batch; the codec's way in, which sees no document, runs once for both.
    """

    def __init__(self, rows: Rows, latent_shape: Sequence[int], twins: Rows | None = None) -> None:
        self._model, self._impl, self._shape = rows.model, rows.impl, tuple(latent_shape)
        tokens = image_tokens(latent_shape, rows.model.config.patch_size)
        mask = IntervalMask.full(tokens, tokens, rows.device)
        self._alone = rows.cache.window(mask)
        self._both = None if twins is None else Pair(self._alone, twins.cache.window(mask))
        self._run_alone, self._run_both = Replayed(), Replayed()

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, h, w) at timestep (B,) -> the prediction (B, C, h, w) float32."""
        return self._run_alone(lambda *given: self._predict(self._alone, 1, *given), latents, timestep)

    def both(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction of the rows, and that of their twins, from one forward."""
        both = self._both
        assert both is not None, "guidance without twins"
        prediction = self._run_both(lambda *given: self._predict(both, 2, *given), latents, timestep)
        conditional, unconditional = prediction.chunk(2)
        return conditional, unconditional

    def _predict(self, window: Window | Pair, copies: int, latents: Tensor, timestep: Tensor) -> Tensor:
        model = self._model
        x, skips = encode(model, latents, timestep)
        if copies > 1:
            x, skips = x.repeat(copies, 1, 1), None if skips is None else skips.repeat(copies)
        hidden = model.transformer(x, positions_of(model, window, latents), window.new, self._impl, window)
        shape = (copies * len(latents), *self._shape)
        return unpatchify(model.decode_images(hidden, skips).float(), shape, model.config.codec_window)
