"""A source becomes endless rows of drafts: captions and texts are encoded and measured, images are not read yet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from transfusion.data.documents import caption_image_length, text_documents
from transfusion.data.packing import RowPlan
from transfusion.data.reading import Draft, MapDeck
from transfusion.data.rows import Contents, PlannedRows, Rows, StreamRows
from transfusion.data.sources import CaptionedImage, ImageSource, SampleError, TextSource, edits_of
from transfusion.data.streams import Stream
from transfusion.data.tokenizer import Tokenizer
from transfusion.data.transforms import Size, nearest_size
from transfusion.sequence import Document, document_length

T = TypeVar("T")

_QUOTED = 60  # characters of a caption in a message

Images = ImageSource | Stream[CaptionedImage]
Texts = TextSource | Sequence[str] | Stream[str]


@dataclass(frozen=True)
class Mixture(Generic[T]):
    """Several sources in one; each gives its weight's share of the rows."""

    sources: tuple[T, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights):
            raise ValueError(f"{len(self.sources)} source(s) but {len(self.weights)} weight(s)")


def caption_ids(tokenizer: Tokenizer, caption: str, max_tokens: int, beside: str = "its image") -> Tensor:
    """-> (n,) int64 with 1 <= n <= max_tokens. Raises `ValueError` naming a caption that is longer, or empty."""
    ids = tokenizer.encode(caption)
    if not len(ids):
        raise ValueError("the caption is empty")
    if len(ids) > max_tokens:
        raise ValueError(
            f"the caption {_quoted(caption)} has {len(ids)} tokens, more than the {max_tokens} that fit beside "
            f"{beside}; shorten it or use a longer context"
        )
    return ids


def _quoted(caption: str) -> str:
    """The caption, or how a long one begins."""
    return repr(caption) if len(caption) <= _QUOTED else f"{caption[:_QUOTED]!r}..."


@dataclass(frozen=True)
class Drafter:
    """How samples are measured and packed.

    sizes: what an image may be cropped to; step: pixels a side of one token; images_per_row: exactly so many, or None;
    shuffle_block: of a stream; skip(source, name, reason) is called for what cannot be used.
    """

    tokenizer: Tokenizer
    row_length: int
    sizes: list[Size]
    step: int
    images_per_row: int | None
    shuffle_block: int
    seed: int
    skip: Callable[[str, str, str], None]

    @property
    def max_caption_tokens(self) -> int:
        """What fits beside an image of the largest size."""
        largest = max(map(self._patches, self.sizes))
        return self.row_length // (self.images_per_row or 1) - caption_image_length(0, largest)

    def image_rows(self, images: Images, name: str) -> Rows[Draft]:
        """Rows of `images`; `name` distinguishes its shuffle from the others'. Raises `ValueError` if nothing fits."""
        if self.max_caption_tokens < 1:
            raise ValueError(
                f"row_length={self.row_length} holds no caption beside {self.images_per_row or 1} "
                f"image(s) of {max(map(self._patches, self.sizes))} tokens; use a longer row or larger patches"
            )
        if isinstance(images, Stream):
            if self.images_per_row:
                raise ValueError("images_per_row needs sources whose samples are listed; a stream packs as many as fit")
            key = (self.seed, name)
            drafts = partial(self._drafts, name)
            return StreamRows(images, drafts, _draft_length, self.row_length, self.shuffle_block, key)
        edits, reasons = edits_of(images), list[str]()
        if self.images_per_row and edits:
            raise ValueError(
                f"images_per_row={self.images_per_row} is of captioned images; an edit takes two: leave it out"
            )
        known = list(self._known(images, name, reasons))
        if not known:
            raise ValueError(f"none of the {len(images)} captioned images can be used; the first: {reasons[0]}")
        lengths = [self._length(caption, size, 1 + (index in edits)) for index, caption, size in known]
        plan = RowPlan(lengths, self.row_length, self.seed, name, self.images_per_row)
        listed = enumerate(zip(images.names, images.captions, strict=True))
        contents = Contents((*words, edits[index]) if index in edits else words for index, words in listed)
        return PlannedRows(MapDeck(images, name, known, lengths), plan, contents)

    def text_rows(self, texts: Texts, name: str) -> Rows[Document]:
        """Rows of windows of `texts`."""
        if isinstance(texts, Stream):
            key = (self.seed, name)
            return StreamRows(texts, self._windows, _text_length, self.row_length, self.shuffle_block, key)
        windows, contents = [], Contents()
        for text in (texts[index] for index in range(len(texts))):
            contents.add(text)
            windows += self._windows(text)
        plan = RowPlan([_text_length(w) for w in windows], self.row_length, self.seed, name)
        return PlannedRows(windows, plan, contents)

    def _known(self, images: ImageSource, source: str, reasons: list[str]) -> Iterator[tuple[int, Tensor, Size]]:
        """(index in the source, caption, size) of each sample that fits a row; the reasons of the others go into
        `reasons`."""
        edits = edits_of(images)
        for index, caption in enumerate(images.captions):
            try:
                ids = self._caption(caption, index in edits)
                size = self.sizes[0] if len(self.sizes) == 1 else nearest_size(*images[index].size, self.sizes)
            except ValueError as error:  # a SampleError is one
                self.skip(source, *_told(images, index, error))
                reasons.append(_reason(error))
            else:
                yield index, ids, size

    def _drafts(self, source: str, sample: CaptionedImage) -> list[Draft]:
        try:
            ids = self._caption(sample.caption, sample.before is not None)
            size = self.sizes[0] if len(self.sizes) == 1 else nearest_size(*sample.size, self.sizes)
        except ValueError as error:
            self.skip(source, sample.name, _reason(error))
            return []
        length = self._length(ids, size, len(sample.pictures))
        return [Draft((source, sample.name), ids, size, length, lambda: sample)]

    def _caption(self, caption: str, edit: bool) -> Tensor:
        room = self.max_caption_tokens
        if edit:
            largest = max(map(self._patches, self.sizes))
            room = self.row_length - caption_image_length(0, largest, images=2)
            if room < 1:
                raise ValueError(
                    f"row_length={self.row_length} holds no two images of {largest} tokens, as an edit takes; use a "
                    "longer row or larger patches"
                )
        return caption_ids(self.tokenizer, caption, room, "two images" if edit else "its image")

    def _windows(self, text: str) -> list[Document]:
        return text_documents(self.tokenizer.encode(text), self.row_length, self.tokenizer.special)

    def _patches(self, size: Size) -> int:
        return (size[0] // self.step) * (size[1] // self.step)

    def _length(self, caption: Tensor, size: Size, images: int) -> int:
        return caption_image_length(len(caption), self._patches(size), images)


def _told(images: ImageSource, index: int, error: ValueError) -> tuple[str, str]:
    """Sample `index` as messages name it, and the reason why it cannot be used."""
    try:
        name = images[index].name
    except SampleError as unreadable:
        name = unreadable.name
    return name, _reason(error)


def _reason(error: ValueError) -> str:
    return error.reason if isinstance(error, SampleError) else str(error)


def _draft_length(draft: Draft) -> int:
    return draft.length


def _text_length(window: Document) -> int:
    return document_length(window, 1)  # text has no patches
