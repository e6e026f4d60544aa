"""The central type: documents of text and image segments, and the batch that a training step reads.

    Document = tuple[Text | Image, ...]
    rows: list[list[Document]]  --collate-->  Batch(token_ids, mask, images, index tensors)

A batch is described once, here. Which tokens are text and which are image is known where the batch is made, on the
host; it travels as index tensors, so no later step has to ask the device for a count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from transfusion.diffusion.times import TimeSampling
from transfusion.kernels import IntervalMask, RaggedLatents
from transfusion.kernels.transfer import moved


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own, all in the tokenizer's vocabulary."""

    pad: int = 0
    bos: int = 1
    eos: int = 2
    boi: int = 3
    eoi: int = 4


_SAMPLING = TimeSampling()


class Text(NamedTuple):
    """A run of text tokens: `token_ids` (n,) int64, special tokens included where they belong to the text."""

    token_ids: Tensor


class Image(NamedTuple):
    """One image: `latent` (C, h, w) float32, clean, and the largest diffusion time to which it may be noised, in (0,
    1]."""

    latent: Tensor
    max_time: float = 1.0


Document = tuple[Text | Image, ...]


def image_tokens(latent_shape: Sequence[int], patch_size: int) -> int:
    """(h / P)·(w / P): how many tokens a latent (C, h, w) takes, BOI and EOI not counted."""
    height, width = latent_shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"a latent of {height}x{width} does not divide into patches of {patch_size}x{patch_size}")
    return (height // patch_size) * (width // patch_size)


def document_length(document: Document, patch_size: int) -> int:
    """Tokens of `document` in a packed row: text tokens, and for each image BOI, its patches, EOI."""
    return sum(
        len(segment.token_ids) if isinstance(segment, Text) else image_tokens(segment.latent.shape, patch_size) + 2
        for segment in document
    )


@dataclass(frozen=True)
class Batch:
    """What one training step reads. B rows of N tokens, I images of n_i tokens each, T of them together.

    token_ids    (B, N) int64   image positions hold `pad`; their embedding is replaced
    positions    (B, N) int64   counted from the start of the token's document (for RoPE)
    mask         IntervalMask   documents apart, images bidirectional
    image_rows   (T,)   int64   flat index b·N + i of each image token, image by image
    token_image  (T,)   int64   which image that token is of
    text_rows    (L,)   int64   flat index of each position that the LM loss reads: a text token, not BOI, whose
                                successor in its document is a text token
    text_targets (L,)   int64   that successor
    latents      (I, C, h, w)   float32, clean; `RaggedLatents` where the images differ in size
    times        (I,)   float32 diffusion time in [0, 1), already within each image's limit
    noise_seed   ()     int64   the noise of the whole batch; the same seed gives the same noise
    """

    token_ids: Tensor
    positions: Tensor
    mask: IntervalMask
    image_rows: Tensor
    token_image: Tensor
    text_rows: Tensor
    text_targets: Tensor
    latents: Tensor | RaggedLatents
    times: Tensor
    noise_seed: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The same batch on `device`; a copy to a GPU makes nothing wait, see `kernels.transfer`."""

        def there(part: Any) -> Any:
            return moved(part, device, non_blocking) if isinstance(part, Tensor) else part.to(device, non_blocking)

        return replace(self, **{f.name: there(getattr(self, f.name)) for f in fields(self)})

    @property
    def num_images(self) -> int:
        """I, known on the host."""
        return self.times.shape[0]


class _Row:
    """One packed row under construction: flat lists, positions relative to the row."""

    def __init__(self, special: SpecialTokens, patch_size: int) -> None:
        self.special, self.patch_size = special, patch_size
        self.token_ids: list[int] = []
        self.is_image: list[bool] = []
        self.positions: list[int] = []
        self.documents: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.images: list[Image] = []

    def add(self, document: Document) -> None:
        start = len(self.token_ids)
        for segment in _segments(document):
            if isinstance(segment, Text):
                self._tokens(segment.token_ids.tolist(), is_image=False)
                continue
            count = image_tokens(segment.latent.shape, self.patch_size)
            self._tokens([self.special.boi], is_image=False)
            self.spans.append((len(self.token_ids), len(self.token_ids) + count))
            self.images.append(segment)
            self._tokens([self.special.pad] * count, is_image=True)
            self._tokens([self.special.eoi], is_image=False)
        length = len(self.token_ids) - start
        if length:
            self.documents.append(length)
            self.positions.extend(range(length))

    def _tokens(self, ids: list[int], is_image: bool) -> None:
        self.token_ids.extend(ids)
        self.is_image.extend([is_image] * len(ids))

    def pad_to(self, length: int) -> None:
        missing = length - len(self.token_ids)
        if missing < 0:
            raise ValueError(f"a row holds {len(self.token_ids)} tokens, more than the row length {length}")
        self._tokens([self.special.pad] * missing, is_image=False)
        self.documents.extend([1] * missing)  # each pad is a document of its own: only it sees itself
        self.positions.extend([0] * missing)

    def text_rows(self) -> list[int]:
        """Positions whose next token, in the same document, is text, and which are text themselves, BOI excluded."""
        rows, start = [], 0
        for length in self.documents:
            rows += [
                i
                for i in range(start, start + length - 1)
                if not self.is_image[i] and not self.is_image[i + 1] and self.token_ids[i] != self.special.boi
            ]
            start += length
        return rows


def _segments(document: Document) -> Document:
    """The document, checked. Raises `TypeError` if it is none, `ValueError` for text without token ids (fake, meta)."""
    if isinstance(document, Text | Image | Tensor) or not isinstance(document, Sequence):
        raise TypeError(
            f"a document must be a tuple of Text and Image segments, got {type(document).__name__}; "
            "rows are lists of documents: [[document, ...], ...]"
        )
    for segment in document:
        held = segment.token_ids if isinstance(segment, Text) else getattr(segment, "latent", None)
        if not isinstance(held, Tensor):
            raise TypeError(f"a segment must be a Text or an Image of a tensor, got {segment!r}")
        if isinstance(segment, Text) and (held.is_meta or isinstance(held, FakeTensor)):
            raise ValueError(
                f"token_ids={held} have no numbers to pack: make them, or the whole batch, before FakeTensorMode is "
                "entered (with allow_non_fake_inputs=True) or torch.device('meta') is the default"
            )
    return document


def collate(
    rows: Sequence[Iterable[Document]],
    length: int,
    patch_size: int,
    special: SpecialTokens,
    generator: torch.Generator,
    sampling: TimeSampling = _SAMPLING,
) -> Batch:
    """Packs row b's documents, on the host, into `length` tokens and draws times and the noise seed.

    Times are drawn as `sampling` says, each within its image's limit, from `generator`: the batch is a pure function of
    its arguments and the generator's state. Raises `ValueError` where a row overflows, or where latents differ in
    their number of channels, or token ids have no values (fake, meta); `TypeError` for what is not a document.
    """
    packed = []
    for documents in rows:
        row = _Row(special, patch_size)
        for document in documents:
            row.add(document)
        row.pad_to(length)
        packed.append(row)
    images = [image for row in packed for image in row.images]
    spans = [(b * length + start, b * length + end) for b, row in enumerate(packed) for start, end in row.spans]
    counts = torch.tensor([end - start for start, end in spans], dtype=torch.int64, device="cpu")
    image_rows = [i for span in spans for i in range(*span)]
    text_rows = [b * length + i for b, row in enumerate(packed) for i in row.text_rows()]
    flat_ids = torch.tensor([row.token_ids for row in packed], dtype=torch.int64, device="cpu")
    text_index = torch.tensor(text_rows, dtype=torch.int64, device="cpu")
    return Batch(
        token_ids=flat_ids,
        positions=torch.tensor([row.positions for row in packed], dtype=torch.int64, device="cpu"),
        mask=IntervalMask.stack(
            [IntervalMask.from_spans(length, row.spans, row.documents, device="cpu") for row in packed]
        ),
        image_rows=torch.tensor(image_rows, dtype=torch.int64, device="cpu"),
        token_image=torch.repeat_interleave(counts, output_size=len(image_rows)),
        text_rows=text_index,
        text_targets=flat_ids.flatten()[text_index + 1],
        latents=_latents([image.latent for image in images], patch_size),
        times=sampling.draw([image.max_time for image in images], generator),
        noise_seed=torch.randint(0, 2**62, (), dtype=torch.int64, generator=generator, device="cpu"),
    )


def _latents(images: Sequence[Tensor], patch_size: int) -> Tensor | RaggedLatents:
    """float32, dense where all shapes are the same, ragged where they differ."""
    if not images:
        return torch.zeros(0, 1, patch_size, patch_size, dtype=torch.float32, device="cpu")
    if len({tuple(image.shape) for image in images}) == 1:
        return torch.stack([image.float() for image in images])
    return RaggedLatents.pack([image.float() for image in images])
