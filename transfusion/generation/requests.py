"""What generation may be asked for, checked before any work is done, and what it gives back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.diffusion.sampler import Known
from transfusion.generation.arguments import check_token_ids, of_kind, real, seed_of_64_bits
from transfusion.kernels.registry import whole
from transfusion.model import Transfusion
from transfusion.sequence import Document, Image, Text, document_length, image_tokens


@dataclass(frozen=True)
class Request:
    """One document so far, and what is wanted after it.

    text to image         max_images=1, image_next=True
    image to text         max_new_tokens=n, the context ending with the image
    continuation          max_new_tokens=n
    interleaved           max_new_tokens=n, max_images=m
    editing               the context an image and an instruction; max_images=1, image_next=True

    Args:
        context: a Text that begins with BOS, then any Text and clean Image segments. BOI is not among them: it comes
            with the image.
        max_new_tokens: tokens of text to draw at most, each BOI counted.
        max_images: images to draw at most; a BOI beyond them ends the document.
        image_next: begin with an image, as if BOI had been drawn.
        seed: of all that is drawn for this document, of 64 bits.
        known: inpainting: what of the first image is given, latents (C, h, w) and unknown (1, h, w).

    Raises:
        ValueError: numbers that ask for nothing.
        TypeError: what is no whole number.
    """

    context: Document
    max_new_tokens: int = 0
    max_images: int = 0
    image_next: bool = False
    seed: int = 0
    known: Known | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed_of_64_bits(self.seed))
        for name in ("max_new_tokens", "max_images"):
            whole(name, getattr(self, name))
        if self.max_new_tokens < 0 or self.max_images < 0:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_images={self.max_images} must be at least 0"
            )
        if not self.max_new_tokens and not self.image_next:
            raise ValueError(
                "max_new_tokens=0 without image_next asks for nothing; give at least 1, or image_next=True"
            )
        if self.image_next and not self.max_images:
            raise ValueError("image_next=True needs max_images of at least 1")
        if self.known is not None and not self.image_next:
            raise ValueError("known= is a part of the next image: it needs image_next=True")


class Generation(NamedTuple):
    """What followed one context.

    new            segments after the context; BOI and EOI come with each image and are not in its text
    token_ids      (T,) int64, every token that was drawn, BOI and EOS included
    logprobs       (T,) float64, of each its natural log-probability under the model itself
    finish_reason  "done": the image that was asked for alone; of text "eos"; "stop": a stop token or string; "length":
                   no room for more; "images": BOI beyond max_images
    """

    new: Document
    token_ids: Tensor
    logprobs: Tensor
    finish_reason: str

    @property
    def images(self) -> list[Tensor]:
        """The latents (C, h, w) of the new images, on the CPU."""
        return [segment.latent for segment in self.new if isinstance(segment, Image)]


def listed(requests: Any) -> list[Request]:
    """The requests as a list. Raises `TypeError` for one alone, and for what is none, naming it."""
    if not isinstance(requests, Iterable):
        raise TypeError(f"requests must be a list of Request, got {type(requests).__name__}; give [request]")
    found = list(requests)
    for index, request in enumerate(found):
        if not isinstance(request, Request):
            raise TypeError(f"request {index} must be a Request, got {type(request).__name__}")
    return found


def one_of_each(name: str, given: Any, contexts: Any) -> tuple[list[Document], list[Any]]:
    """Contexts and what goes with them, as lists. Raises `TypeError` for what is none, `ValueError` unless as many."""
    for its, each in (("contexts", contexts), (name, given)):
        if not isinstance(each, Iterable):
            raise TypeError(f"{its} must be a list, got {type(each).__name__}")
    documents, others = list(contexts), list(given)
    if len(others) != len(documents):
        raise ValueError(f"{len(others)} {name} for {len(documents)} contexts; give one of each")
    return documents, others


def check_requests(
    model: Transfusion, requests: Sequence[Request], latent_shape: Sequence[int], max_length: int | None
) -> None:
    """Raises `ValueError` or `TypeError` for the first request that the model cannot be asked, naming it."""
    contexts = [request.context for request in requests]
    check_contexts(model, contexts)
    check_latent_shape(model, latent_shape)
    for index, request in enumerate(requests):
        if request.max_images:
            _check_boi(model, index, request.context)
        if request.known is not None:
            _check_known(index, request.known, tuple(latent_shape))
        length = document_length(request.context, model.config.patch_size)
        more = image_tokens(latent_shape, model.config.patch_size) + 2 if request.image_next else 1
        if max_length is not None and length + more > max_length:
            raise ValueError(
                f"context {index} has {length} tokens; with {more} more for what comes next it is longer than "
                f"max_length={max_length}, the longest document of the model; give a shorter one"
            )


def check_contexts(model: Transfusion, contexts: Sequence[Document]) -> None:
    """Raises `ValueError` unless each is a document so far: text that begins with BOS, then anything of the model's;
    with the U-Net codec, images of one size."""
    config = model.config
    check_documents(contexts)
    if not len(contexts):
        raise ValueError("no contexts are given: generation needs at least one, such as (Text(torch.tensor([bos])),)")
    for index, context in enumerate(contexts):
        for segment in context:
            if isinstance(segment, Text):
                check_token_ids(f"the text of context {index}", segment.token_ids)
        first = context[0] if len(context) else None
        if not isinstance(first, Text) or not len(first.token_ids) or first.token_ids[0] != config.special.bos:
            raise ValueError(
                f"context {index} must begin with a Text that begins with BOS ({config.special.bos}), "
                f"as documents do in training; it begins with {_describe(first)}"
            )
        for place, segment in enumerate(context):
            if isinstance(segment, Image):
                _check_image(model, index, segment)
                _check_boi(model, index, context[:place])
            elif len(ids := segment.token_ids) and (ids.min() < 0 or ids.max() >= config.vocab_size):
                raise ValueError(
                    f"context {index} holds token ids {int(ids.min())}..{int(ids.max())}, outside the vocabulary "
                    f"of {config.vocab_size}; is the tokenizer the model's?"
                )
    if config.codec == "unet":
        _check_one_size(contexts)


def check_documents(contexts: Sequence[Document]) -> None:
    """Raises `TypeError` unless each is a tuple, or a list, of Text and Image."""
    for index, context in enumerate(contexts):
        alone = isinstance(context, Text | Image)  # which are tuples too
        if alone or not isinstance(context, Sequence):
            cure = "; give (segment,)" if alone else ""
            kind = type(context).__name__
            raise TypeError(f"context {index} must be a tuple of Text and Image segments, got {kind}{cure}")
        for segment in context:
            if not isinstance(segment, Text | Image):
                raise TypeError(f"context {index} holds a {type(segment).__name__}; its segments are Text and Image")


def check_latent_shape(model: Transfusion, shape: Sequence[int]) -> None:
    """Raises `ValueError` unless `shape` is a (C, h, w) that the model's patches tile."""
    channels, patch = model.config.latent_channels, model.config.patch_size
    if len(shape) != 3 or shape[0] != channels or min(shape) < 1 or shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"a latent of shape {tuple(shape)} does not fit the model: it takes ({channels}, h, w) "
            f"with h and w multiples of its patch size {patch}"
        )


def _check_image(model: Transfusion, index: int, image: Image) -> None:
    latent = image.latent
    if not isinstance(latent, Tensor) or not latent.dtype.is_floating_point:
        kind = latent.dtype if isinstance(latent, Tensor) else type(latent).__name__
        raise TypeError(f"an image of context {index} must have a latent (C, h, w) of floating point, got {kind}")
    check_latent_shape(model, latent.shape)
    real(f"max_time of an image of context {index}", image.max_time)
    if not latent.isfinite().all():
        raise ValueError(
            f"context {index} holds a latent with NaN or infinities; look at the image and its autoencoder"
        )


def _describe(segment: Text | Image | None) -> str:
    if isinstance(segment, Text):
        return f"tokens {segment.token_ids[:4].tolist()}"
    return "nothing" if segment is None else "an image"


def _check_boi(model: Transfusion, index: int, before: Sequence[Text | Image]) -> None:
    """Raises `ValueError` where what stands before an image ends with BOI."""
    said = [part for part in before if isinstance(part, Image) or len(part.token_ids)]
    if said and isinstance(said[-1], Text) and said[-1].token_ids[-1] == model.config.special.boi:
        raise ValueError(f"context {index} has BOI before an image, with which it comes; leave it out")


def _check_known(index: int, known: Known, latent_shape: tuple[int, ...]) -> None:
    of_kind(f"known of request {index}", known, Known)
    of_kind(f"known.latents of request {index}", known.latents, Tensor)
    of_kind(f"known.unknown of request {index}", known.unknown, Tensor)
    found, wanted = (tuple(known.latents.shape), tuple(known.unknown.shape)), (latent_shape, (1, *latent_shape[1:]))
    if found != wanted:
        raise ValueError(f"known of request {index} has latents and unknown of shapes {found}; they must be {wanted}")
    if known.unknown.dtype != torch.bool:
        raise TypeError(
            f"known.unknown of request {index} must be bool, True where to paint, got {known.unknown.dtype}"
        )
    if not (known.latents.isfinite() | known.unknown.to(known.latents.device)).all():
        raise ValueError(
            f"known of request {index} has latents with NaN or infinities; look at the image and its autoencoder"
        )


def _check_one_size(contexts: Sequence[Document]) -> None:
    found = [
        (i, tuple(part.latent.shape)) for i, each in enumerate(contexts) for part in each if isinstance(part, Image)
    ]
    for index, shape in found:
        first, wanted = found[0]
        if shape != wanted:
            raise ValueError(
                f"context {index} holds a latent of shape {shape}, context {first} one of {wanted}; the U-Net codec "
                "reads images of one size in a call: crop them to one, or give each size a call of its own"
            )
