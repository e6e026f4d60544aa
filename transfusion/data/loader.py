"""batch(step) is a pure function of (seed, step, rank, world_size): resuming needs the step number and nothing else.

    global row g = (step·world_size + rank)·rows + i
    row g is text where floor((g + 1)·text_fraction) > floor(g·text_fraction), else captioned images
    its documents are the next row of the text or of the image plan (packing.RowPlan)

So ranks read disjoint rows, every sample is used equally often, and the mix is exact at any batch size.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from transfusion.data.autoencoder import Autoencoder, PixelAutoencoder
from transfusion.data.documents import caption_image_document, caption_image_length, text_documents
from transfusion.data.packing import RowPlan, seeded
from transfusion.data.sources import ImageSource, SampleError, Skipped, TextSource
from transfusion.data.tokenizer import Tokenizer
from transfusion.data.transforms import check_image_size, to_tensor
from transfusion.sequence import Batch, Document, collate, document_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches. Defaults are those of arXiv 2408.11039, or marked where it is silent.

    Args:
        rows: rows of a batch, on each rank.
        row_length: tokens of a row.
        image_size: pixels; images are cropped to their central square and resized.
        patch_size: latents a side that become one token.
        images_per_row: exactly so many captioned images in each image row, the same number in every batch; None
            packs as many as fit.
        text_fraction: fraction of the rows that are text; with full rows that is 1:1 text to image tokens.
        caption_first: probability that the caption comes before its image.
        caption_dropout: probability that a caption is left out, for guidance (the paper is silent).
        max_time_image_first: largest diffusion time of an image that comes before its caption.
        seed: of everything that is random here.
    """

    rows: int
    row_length: int = 4096
    image_size: int = 256
    patch_size: int = 2
    images_per_row: int | None = None
    text_fraction: float = 0.5
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    max_time_image_first: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "row_length", "image_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_fraction", "caption_first", "caption_dropout", "max_time_image_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.images_per_row is not None and self.images_per_row < 1:
            raise ValueError(f"images_per_row must be at least 1 or None, got {self.images_per_row}")


@dataclass(frozen=True)
class LoaderStats:
    """Means over an epoch, of one batch on one rank, before captions are dropped.

    fill: fraction of positions that hold a token; images; image_tokens: patches; text_tokens: all other tokens.
    """

    fill: float
    images: float
    image_tokens: float
    text_tokens: float


def caption_ids(tokenizer: Tokenizer, caption: str, max_tokens: int) -> Tensor:
    """-> (n,) int64 with 1 <= n <= max_tokens. Raises `ValueError` naming a caption that is longer, or empty."""
    ids = tokenizer.encode(caption)
    if not len(ids):
        raise ValueError("the caption is empty")
    if len(ids) > max_tokens:
        raise ValueError(
            f"the caption {caption!r} has {len(ids)} tokens, more than the {max_tokens} that fit beside its image; "
            "shorten it or use a longer context"
        )
    return ids


class Loader:
    """Batches of captioned images and text: `batch(step)`, or `iterate(start_step)` which prepares them ahead.

    Give `images`, `texts` or both, as `text_fraction` asks for. Captions that do not fit are skipped at
    construction; images that cannot be decoded are skipped when they are met, and the next sample that fits takes
    their place. Both are warned about, and kept by name and reason in `skipped`.
    max_caption_tokens: what fits beside an image. tokens_per_image: its patches. stats: `LoaderStats`.
    """

    def __init__(
        self,
        config: LoaderConfig,
        tokenizer: Tokenizer,
        images: ImageSource | None = None,
        texts: TextSource | Sequence[str] | None = None,
        autoencoder: Autoencoder | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sources(config, images, texts)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self._special = tokenizer.special
        self._autoencoder: Autoencoder = PixelAutoencoder() if autoencoder is None else autoencoder
        check_image_size(config.image_size, self._autoencoder.downscale, config.patch_size)
        self.tokens_per_image = (config.image_size // self._autoencoder.downscale // config.patch_size) ** 2
        image_budget = config.row_length // (config.images_per_row or 1)
        self.max_caption_tokens = image_budget - caption_image_length(0, self.tokens_per_image)
        # Decoders release the interpreter lock; torch's own threads would compete with the training step's.
        self._decoders = ThreadPoolExecutor(4, "decode", torch.set_num_threads, (1,))
        self._skipped: dict[str, str] = {}
        self._unreadable: set[int] = set()
        self._images = images
        self._captions = self._read_captions(images, tokenizer) if images and config.text_fraction < 1 else []
        self._windows = self._read_texts(texts, tokenizer) if texts and config.text_fraction > 0 else []
        self._text_fraction = Fraction(config.text_fraction).limit_denominator(10_000)
        self._image_plan = RowPlan(
            [self._length(sample) for sample in range(len(self._captions))],
            config.row_length,
            config.seed,
            "images",
            config.images_per_row,
        )
        window_lengths = [document_length(window, config.patch_size) for window in self._windows]
        self._text_plan = RowPlan(window_lengths, config.row_length, config.seed, "texts")

    @property
    def skipped(self) -> list[Skipped]:
        """(name, reason) of each sample that this loader skipped so far; what a source skipped is in the source's."""
        return list(self._skipped.items())

    @property
    def stats(self) -> LoaderStats:
        """How full the batches are, and of what."""
        text_rows = float(self.config.rows * self._text_fraction)
        image_rows = self.config.rows - text_rows
        images = image_rows * self._image_plan.mean_documents
        tokens = self.config.row_length * (image_rows * self._image_plan.fill + text_rows * self._text_plan.fill)
        image_tokens = images * self.tokens_per_image
        positions = self.config.rows * self.config.row_length
        return LoaderStats(tokens / positions, images, image_tokens, tokens - image_tokens)

    def batch(self, step: int) -> Batch:
        """The batch of `step` = 0, 1, 2, ... on this rank, on the host; the same at every call."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        first = (step * self.world_size + self.rank) * self.config.rows
        generator = seeded(self.config.seed, "batch", step, self.rank)
        text_rows: dict[int, list[Document]] = {}
        image_rows: dict[int, list[int]] = {}
        for row in range(first, first + self.config.rows):
            texts_before = floor(row * self._text_fraction)
            if floor((row + 1) * self._text_fraction) > texts_before:
                text_rows[row] = [self._windows[window] for window in self._text_plan.row(texts_before)]
            else:
                image_rows[row] = self._image_plan.row(row - texts_before)
        rows = {**text_rows, **self._image_documents(image_rows, generator)}
        ordered = [rows[row] for row in sorted(rows)]
        return collate(ordered, self.config.row_length, self.config.patch_size, self._special, generator)

    def iterate(self, start_step: int = 0, prefetch: int = 2) -> Iterator[Batch]:
        """batch(start_step), batch(start_step + 1), ... without end, `prefetch` of them prepared in a thread."""
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        pool = ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,))
        try:
            pending = deque(pool.submit(self.batch, start_step + ahead) for ahead in range(prefetch))
            step = start_step + prefetch
            while True:
                ready = pending.popleft().result()
                pending.append(pool.submit(self.batch, step))
                step += 1
                yield ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_captions(self, images: ImageSource, tokenizer: Tokenizer) -> list[tuple[int, Tensor]]:
        """(index in the source, caption) of each sample that fits a row."""
        if self.max_caption_tokens < 1:
            raise ValueError(
                f"row_length={self.config.row_length} holds no caption beside {self.config.images_per_row or 1} "
                f"image(s) of {self.tokens_per_image} tokens; use a longer row or larger patches"
            )
        captions = []
        for index, caption in enumerate(images.captions):
            try:
                captions.append((index, caption_ids(tokenizer, caption, self.max_caption_tokens)))
            except ValueError as error:
                self._skip(images.names[index], str(error))
        if not captions:
            raise ValueError(f"none of the {len(images)} captions fits in {self.max_caption_tokens} tokens")
        return captions

    def _read_texts(self, texts: TextSource | Sequence[str], tokenizer: Tokenizer) -> list[Document]:
        length = self.config.row_length
        encoded = (tokenizer.encode(texts[index]) for index in range(len(texts)))
        return [window for ids in encoded for window in text_documents(ids, length, self._special)]

    def _image_documents(self, rows: dict[int, list[int]], generator: torch.Generator) -> dict[int, list[Document]]:
        wanted = [sample for samples in rows.values() for sample in samples]
        pixels = iter(list(self._decoders.map(self._pixels, wanted)))
        read = {row: self._substitute(samples, [next(pixels) for _ in samples]) for row, samples in rows.items()}
        images = [image for pairs in read.values() for _, image in pairs]
        if not images:
            return {row: [] for row in rows}
        latents = iter(self._autoencoder.encode(torch.stack(images)).cpu())
        draws = iter((torch.rand(len(images), 2, generator=generator, dtype=torch.float64)).tolist())
        return {row: [self._document(s, next(latents), *next(draws)) for s, _ in read[row]] for row in rows}

    def _document(self, sample: int, latent: Tensor, order: float, dropout: float) -> Document:
        return caption_image_document(
            self._captions[sample][1],
            latent,
            image_first=order >= self.config.caption_first,
            drop_caption=dropout < self.config.caption_dropout,
            special=self._special,
            max_time_image_first=self.config.max_time_image_first,
        )

    def _substitute(self, samples: list[int], pixels: list[Tensor | None]) -> list[tuple[int, Tensor]]:
        """Unreadable samples of one row replaced by the next ones that fit; a slot that nothing fits stays empty."""
        free = self.config.row_length - sum(self._length(sample) for sample in samples)
        read = []
        for sample, image in zip(samples, pixels, strict=True):
            if image is not None:
                read.append((sample, image))
                continue
            free += self._length(sample)
            for offset in range(1, len(self._captions)):
                other = (sample + offset) % len(self._captions)
                image = self._pixels(other) if self._length(other) <= free else None
                if image is not None:
                    read.append((other, image))
                    free -= self._length(other)
                    break
        if len(self._unreadable) == len(self._captions):
            raise RuntimeError(f"none of the {len(self._captions)} images can be read; the last: {self.skipped[-1]}")
        return read

    def _pixels(self, sample: int) -> Tensor | None:
        if sample in self._unreadable:
            return None
        assert self._images is not None
        try:
            return to_tensor(self._images[self._captions[sample][0]].image, self.config.image_size)
        except SampleError as error:
            self._unreadable.add(sample)
            self._skip(error.name, error.reason)
            return None

    def _length(self, sample: int) -> int:
        return caption_image_length(len(self._captions[sample][1]), self.tokens_per_image)

    def _skip(self, name: str, reason: str) -> None:
        if self._skipped.setdefault(name, reason) is reason:
            logger.warning("skipped %s: %s", name, reason)


def _check_sources(config: LoaderConfig, images: ImageSource | None, texts: TextSource | Sequence[str] | None) -> None:
    if config.text_fraction > 0 and not texts:
        raise ValueError(f"text_fraction={config.text_fraction} needs a text source; give texts or set it to 0")
    if config.text_fraction < 1 and not images:
        raise ValueError(f"text_fraction={config.text_fraction} needs an image source; give images or set it to 1")
