"""Batches of captioned images and text: the same rows in the same order on any number of ranks.

    global row g = (step·world_size + rank)·rows + i       so ranks read disjoint rows
    its source   = Mix.place(g)                            text and image rows in their shares, at any batch size
    its documents are the source's next row                packed best fit (rows.py)

Over map-style sources batch(step) is a pure function of (seed, step, rank, world_size). A stream is read in order. In
both cases `state_dict()` is a few numbers, the same on every rank, and a loader with another batch size or number of
ranks resumes from there without losing or repeating a sample; they also tell whether a source or the autoencoder has
changed.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from transfusion.data.autoencoder import Autoencoder, PixelAutoencoder
from transfusion.data.documents import caption_image_document
from transfusion.data.drafting import Drafter, Images, Mixture, Texts
from transfusion.data.latent_cache import LatentCache
from transfusion.data.packing import seeded
from transfusion.data.reading import Content, Draft, ImageReader
from transfusion.data.rows import Mix, PlannedRows, Rows
from transfusion.data.sources import SampleError, Skipped
from transfusion.data.streams import Stream
from transfusion.data.tokenizer import Tokenizer
from transfusion.data.transforms import bucket_sizes, check_image_size
from transfusion.diffusion.times import TimeSampling
from transfusion.sequence import Batch, Document, collate

logger = logging.getLogger(__name__)

Contents = tuple[Content, ...]


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches. Defaults are those of arXiv 2408.11039, or marked where it is silent.

    Args:
        rows: rows of a batch, on each rank.
        row_length: tokens of a row.
        image_size: pixels a side; images are cropped to their central square and resized.
        aspect_ratios: such as "1:1", "4:3", "3:4": an image is cropped to the closest of them instead, at a size of
            about image_size² pixels, in evaluation too. Images of one batch then differ in size.
        patch_size: latents a side that become one token.
        images_per_row: exactly so many captioned images in each image row, the same number in every batch; None
            packs as many as fit.
        text_fraction: fraction of the rows that are text; with full rows that is 1:1 text to image tokens. In a run
            without texts it is 0, without images 1.
        caption_first: probability that the caption comes before its image; an edit's always does.
        caption_dropout: probability that a caption (and with it an edit's source image) is left out, for guidance; the
            paper is silent.
        max_time_image_first: largest diffusion time of an image that comes before its caption.
        sample_latents: draw a latent from the autoencoder's posterior each time, rather than take its mode.
        shuffle_block: samples of a stream that are shuffled and packed together; a block is held in memory.
        workers: processes that decode images; 0 is threads.
        times: how diffusion times are drawn.
        seed: of everything that is random here.
    """

    rows: int
    row_length: int = 4096
    image_size: int = 256
    aspect_ratios: tuple[str, ...] = ()
    patch_size: int = 2
    images_per_row: int | None = None
    text_fraction: float = 0.5
    caption_first: float = 0.8
    caption_dropout: float = 0.1
    max_time_image_first: float = 0.5
    sample_latents: bool = False
    shuffle_block: int = 4096
    workers: int = 0
    times: TimeSampling = field(default_factory=TimeSampling)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "row_length", "image_size", "patch_size", "shuffle_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_fraction", "caption_first", "caption_dropout", "max_time_image_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.images_per_row is not None and self.images_per_row < 1:
            raise ValueError(f"images_per_row must be at least 1 or None, got {self.images_per_row}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")


class _Prepared(NamedTuple):
    batch: Batch
    state: dict[str, Any]


class Loader:
    """Endless batches: `iterate()` prepares them ahead, starting from the loader's state.

    images, texts: a source, a stream, or a `Mixture` of them; give both, or the one that `text_fraction` asks for.
    cache: latents that were encoded before. Captions that do not fit and images that cannot be decoded are skipped,
    warned about, and kept by name and reason in `skipped`, as is what a source skipped; the next sample that fits takes
    the place of an image.
    max_caption_tokens: what fits beside an image.
    """

    def __init__(
        self,
        config: LoaderConfig,
        tokenizer: Tokenizer,
        images: Images | Mixture[Images] | None = None,
        texts: Texts | Mixture[Texts] | None = None,
        autoencoder: Autoencoder | None = None,
        rank: int = 0,
        world_size: int = 1,
        cache: LatentCache | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self._special = tokenizer.special
        encoder: Autoencoder = PixelAutoencoder() if autoencoder is None else autoencoder
        self._encoder = str(getattr(encoder, "fingerprint", ""))  # only of an autoencoder whose weights can change
        self._reader = ImageReader(encoder, cache, config.workers, config.sample_latents)
        self._skipped: dict[tuple[str, str], str] = {}
        self._unreadable: dict[tuple[str, str | int], str] = {}  # not the errors: these hold what was being decoded
        if not config.aspect_ratios:
            check_image_size(config.image_size, encoder.downscale, config.patch_size)
        pixels = encoder.downscale * config.patch_size
        sizes = bucket_sizes(config.aspect_ratios, config.image_size, pixels)
        drafter = Drafter(
            tokenizer,
            config.row_length,
            sizes,
            pixels,
            config.images_per_row,
            config.shuffle_block,
            config.seed,
            self._skip_planned,
        )
        self.max_caption_tokens = drafter.max_caption_tokens
        text: Mixture[Texts] = _mixture(texts, config.text_fraction, config, "a text")
        image: Mixture[Images] = _mixture(images, 1 - config.text_fraction, config, "an image")
        texts_named = {f"texts{k or ''}": source for k, source in enumerate(text.sources)}
        images_named = {f"images{k or ''}": source for k, source in enumerate(image.sources)}
        self._named: dict[str, Any] = {**texts_named, **images_named}
        self._texts = [drafter.text_rows(source, name) for name, source in texts_named.items()]
        self._images = [drafter.image_rows(source, name) for name, source in images_named.items()]
        self._mix = Mix([*text.weights, *image.weights])
        self._state = self._state_at(0)

    @property
    def skipped(self) -> list[Skipped]:
        """(name, reason) of each sample that could not be used so far; rank 0 has what all ranks come across."""
        for source, samples in self._named.items() if self.rank == 0 else ():
            for name, reason in samples.skipped:
                self._skipped.setdefault((source, name), reason)
        return [(name, reason) for (_, name), reason in list(self._skipped.items())]

    def state_dict(self) -> dict[str, Any]:
        """Where the rows continue after the last batch that `iterate` handed out; the same on every rank."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`iterate` continues where the loader of `state` stood, whatever its batch size and number of ranks were.

        Raises `ValueError` if the sources or the autoencoder are different; warns if a source's samples have changed.
        """
        before = state.get("encoder")  # older checkpoints lack it
        if before and before != self._encoder:
            raise ValueError(
                f"the autoencoder is another than at the checkpoint (sha256 of its encoder "
                f"{self._encoder[:16] or 'none'}, then {before[:16]}): its latents mean nothing to what was learned; "
                "put the old one back"
            )
        if len(state["sources"]) != len(self._sources):
            raise ValueError(f"the state is of {len(state['sources'])} source(s), but there are {len(self._sources)}")
        self._restore(state)
        for number, (rows, place) in enumerate(zip(self._sources, state["sources"], strict=True)):
            change = rows.change(place)
            if change and self.rank == 0:
                kind = "texts" if number < len(self._texts) else "images"
                message = "the %s have changed since the checkpoint (%s): what follows is not what would have followed"
                logger.warning(message, kind, change)

    def _restore(self, state: dict[str, Any]) -> None:
        for rows, place in zip(self._sources, state["sources"], strict=True):
            rows.restore(place)
        self._state = state

    def batch(self, step: int) -> Batch:
        """The batch of `step` = 0, 1, 2, ... on this rank, on the host; the same at every call. Not for streams."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if not all(isinstance(rows, PlannedRows) for rows in self._sources):
            raise ValueError("a stream is read in order: use iterate()")
        return self._prepare(step * self._stride).batch

    def iterate(self, prefetch: int = 2) -> Iterator[Batch]:
        """The batches after `state_dict()`, without end, `prefetch` of them prepared in a thread."""
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        self._restore(self._state)  # a stream may be ahead, after an earlier call
        pool = ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,))
        row = int(self._state["row"])
        try:
            pending = deque(pool.submit(self._prepare, row + k * self._stride) for k in range(prefetch))
            while True:
                ready = pending.popleft().result()
                pending.append(pool.submit(self._prepare, row + prefetch * self._stride))
                row += self._stride
                self._state = ready.state
                yield ready.batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _sources(self) -> list[Rows[Any]]:
        return [*self._texts, *self._images]

    @property
    def _stride(self) -> int:
        """Rows of one batch on all ranks."""
        return self.world_size * self.config.rows

    def _state_at(self, row: int) -> dict[str, Any]:
        places = zip(self._sources, self._mix.before(row), strict=True)
        return {"row": row, "sources": [rows.state(index) for rows, index in places], "encoder": self._encoder}

    def _prepare(self, row: int) -> _Prepared:
        """This rank's batch of the rows from `row` on, and the state after the batches of all ranks."""
        first, config = row + self.rank * self.config.rows, self.config
        rows = self._rows(range(first, first + config.rows))
        generator = seeded(config.seed, "batch", first)
        batch = collate(rows, config.row_length, config.patch_size, self._special, generator, config.times)
        return _Prepared(batch, self._state_at(row + self._stride))

    def _rows(self, numbers: range) -> list[list[Document]]:
        """The documents of these rows; all their images are read side by side."""
        texts: dict[int, list[Document]] = {}
        images: dict[int, tuple[Sequence[Draft], list[int]]] = {}
        for number in numbers:
            source, index = self._mix.place(number)
            if source < len(self._texts):
                windows, chosen = self._texts[source].row(index)
                texts[number] = [windows[k] for k in chosen]
            else:
                images[number] = self._images[source - len(self._texts)].row(index)
        drafts = {number: [deck[place] for place in places] for number, (deck, places) in images.items()}
        contents = iter(self._contents([draft for row in drafts.values() for draft in row]))
        read = {number: [(draft, next(contents)) for draft in row] for number, row in drafts.items()}
        pictured = {number: self._pictured(number, read[number], *images[number]) for number in images}
        return [texts[number] if number in texts else pictured[number] for number in numbers]

    def _pictured(
        self, number: int, read: list[tuple[Draft, Contents | None]], deck: Sequence[Draft], places: list[int]
    ) -> list[Document]:
        """The documents of an image row, random by the row's number alone."""
        whole = self._substituted(read, deck, places)
        generator = seeded(self.config.seed, "row", number)
        draws = torch.rand(len(whole), 2, generator=generator, dtype=torch.float64, device="cpu").tolist()
        documents = []
        for (draft, contents), (order, dropout) in zip(whole, draws, strict=True):
            *before, latent = [self._reader.latent(content, generator) for content in contents]
            document = caption_image_document(
                draft.caption,
                latent,
                image_first=order >= self.config.caption_first,
                drop_caption=dropout < self.config.caption_dropout,
                special=self._special,
                max_time_image_first=self.config.max_time_image_first,
                before=before[0] if before else None,
            )
            documents.append(document)
        return documents

    def _substituted(
        self, read: list[tuple[Draft, Contents | None]], deck: Sequence[Draft], places: list[int]
    ) -> list[tuple[Draft, Contents]]:
        """In place of a draft that cannot be read, the next one of the deck that fits; if none does, nothing."""
        free = self.config.row_length - sum(draft.length for draft, _ in read)
        whole = []
        for place, (draft, contents) in zip(places, read, strict=True):
            if contents is None:
                free += draft.length
                others = (deck[(place + offset) % len(deck)] for offset in range(1, len(deck)))
                candidates = ((other, self._contents([other])[0]) for other in others if other.length <= free)
                draft, contents = next(((d, c) for d, c in candidates if c is not None), (draft, None))
                free -= draft.length if contents is not None else 0
            if contents is not None:
                whole.append((draft, contents))
        if not whole and all(draft.key in self._unreadable for draft in deck):
            raise ValueError(f"none of the {len(deck)} images can be read; the last: {self._unreadable[deck[-1].key]}")
        return whole

    def _contents(self, drafts: list[Draft]) -> list[Contents | None]:
        """Pixels or moments of each draft's pictures; None, and a warning, for one that cannot be read."""
        wanted = [draft for draft in drafts if draft.key not in self._unreadable]
        read = dict(zip(map(id, wanted), self._reader.read(wanted), strict=True))
        for draft in wanted:
            error = read[id(draft)]
            if isinstance(error, SampleError):
                self._unreadable[draft.key] = str(error)
                self._skip(draft.key[0], error.name, error.reason)
        found = [read.get(id(draft)) for draft in drafts]
        return [None if isinstance(contents, SampleError) else contents for contents in found]

    def _skip_planned(self, source: str, name: str, reason: str) -> None:
        """Every rank plans the same rows, so one rank reports what fits in none."""
        if self.rank == 0:
            self._skip(source, name, reason)

    def _skip(self, source: str, name: str, reason: str) -> None:
        if (source, name) not in self._skipped:
            self._skipped[source, name] = reason
            logger.warning("skipped %s: %s", name, reason)


def _mixture(sources: Any, fraction: float, config: LoaderConfig, kind: str) -> Mixture[Any]:
    """The sources with weights that sum to `fraction`; none if that is 0."""
    if fraction == 0:
        return Mixture((), ())
    if sources is None or (not isinstance(sources, Mixture | Stream) and not sources):
        cure = f"give {kind.split()[1]}s or set it to {int('image' in kind)}"
        raise ValueError(f"text_fraction={config.text_fraction} needs {kind} source; {cure}")
    mixture = sources if isinstance(sources, Mixture) else Mixture((sources,), (1.0,))
    total = sum(mixture.weights)
    return Mixture(mixture.sources, tuple(fraction * weight / total for weight in mixture.weights))
