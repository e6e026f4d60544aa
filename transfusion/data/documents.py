"""Samples become documents: a caption with its image, in either order, and windows of a text.

    caption first   BOS caption [BOI image EOI] EOS         image noised to any time
    image first     BOS [BOI image EOI] caption EOS         image noised to max_time_image_first at most
    edit            BOS [BOI before EOI] caption [BOI image EOI] EOS     `before` as an image first
    no caption      BOS [BOI image EOI]                     the unconditional branch of guidance
    text            BOS window | BOS window | BOS window EOS

`collate` adds BOI and EOI. Order and noise limit: arXiv 2408.11039, section 3 and section 4.3; edits: section 4.5.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from transfusion.sequence import Batch, Document, Image, SpecialTokens, Text, collate, document_length

_SPECIAL = SpecialTokens()


def _text(*parts: Tensor | int) -> Text:
    ids: list[int] = []  # one tensor of a list is made faster than a few tensors are joined
    for part in parts:
        ids += [part] if isinstance(part, int) else part.tolist()
    return Text(torch.tensor(ids, dtype=torch.int64, device="cpu"))


def caption_image_length(caption_tokens: int, tokens_per_image: int, images: int = 1) -> int:
    """caption + (image + 2)·images + 2: a caption with its image (an edit has two), with BOS, BOI, EOI and EOS."""
    return caption_tokens + images * (tokens_per_image + 2) + 2


def caption_image_document(
    caption_ids: Tensor,
    latent: Tensor,
    image_first: bool = False,
    drop_caption: bool = False,
    special: SpecialTokens = _SPECIAL,
    max_time_image_first: float = 0.5,
    before: Tensor | None = None,
) -> Document:
    """One document of a caption (n,) int64 and a clean latent (C, h, w), in one of the orders above.

    With the caption dropped there is nothing for the image to come before, so `image_first` does not limit its noise.
    No EOS follows then, since it would teach that an image without a caption before it has none after it either.

    before: the latent that the caption says how to change. It comes first whatever `image_first` says, and is dropped
    with the caption: guidance compares with an image about which nothing is known.
    """
    if drop_caption:
        return (_text(special.bos), Image(latent))
    if before is not None:
        first = Image(before, max_time_image_first)
        return (_text(special.bos), first, _text(caption_ids), Image(latent), _text(special.eos))
    if image_first:
        return (_text(special.bos), Image(latent, max_time_image_first), _text(caption_ids, special.eos))
    return (_text(special.bos, caption_ids), Image(latent), _text(special.eos))


def text_documents(token_ids: Tensor, length: int, special: SpecialTokens = _SPECIAL) -> list[Document]:
    """Cuts a text (n,) int64 into documents of at most `length` tokens; each token is a target exactly once.

    Each window starts with BOS; EOS follows only the last one, where the text really ends.
    """
    if length < 2:
        raise ValueError(f"a window of {length} token(s) cannot hold BOS and a token")
    ended = torch.cat([token_ids, token_ids.new_tensor([special.eos])])
    return [(_text(special.bos, window),) for window in ended.split(length - 1)]


def mismatched(captions: Sequence[Tensor], generator: torch.Generator) -> list[int]:
    """-> a random permutation with captions[permutation[i]] != captions[i] for every i.

    Raises `ValueError` if more than half of the captions are the same: then no such permutation exists.
    """
    keys = [tuple(caption.tolist()) for caption in captions]
    counts = Counter(keys)
    largest = max(counts.values(), default=0)
    if 2 * largest > len(keys):
        raise ValueError(f"{largest} of {len(keys)} captions are the same: they cannot all be given another one")
    shuffled = torch.randperm(len(keys), generator=generator, device="cpu").tolist()
    group = {key: number for number, key in enumerate(dict.fromkeys(keys[i] for i in shuffled))}
    # equal captions lie side by side; a rotation by the size of the largest group takes each out of its group
    ring = sorted(shuffled, key=lambda i: group[keys[i]])
    partner = [0] * len(ring)
    for place, i in enumerate(ring):
        partner[i] = ring[(place + largest) % len(ring)]
    return partner


def evaluation_batch(
    captions: Sequence[Tensor],
    latents: Tensor | Sequence[Tensor],
    times: Tensor,
    noise_seed: int,
    patch_size: int,
    special: SpecialTokens = _SPECIAL,
    before: Sequence[Tensor | None] | None = None,
) -> tuple[Batch, Tensor]:
    """A batch of given pairs, times and noise, and the numbers (I,) int64 of these images in it: row i is caption i,
    then image i at times[i]; an edit's row begins with before[i], at time 0, as when sampling.

    captions: I tensors (n_i,) int64; latents: I of (C, h_i, w_i); times (I,) in [0, 1); before: I like the latents, or
    None for what is no edit. Rows have room for the longest caption beside the most, or the largest, images, so that
    the captions in another order (`mismatched`) give the same images, noise, times and shapes: the difference of the
    two diffusion losses is what the captions are worth. Raises `ValueError` for an empty batch, or lists of different
    lengths.
    """
    firsts = [None] * len(captions) if before is None else before
    if not len(captions) == len(latents) == len(times) == len(firsts):
        raise ValueError(
            f"{len(captions)} captions, {len(latents)} latents, {len(times)} times, {len(firsts)} before: "
            "give one of each"
        )
    if not len(captions):
        raise ValueError("an evaluation batch needs at least one caption and latent")
    given = zip(captions, latents, firsts, strict=True)
    rows = [[caption_image_document(c, latent, special=special, before=first)] for c, latent, first in given]
    # the longest caption beside the most images: another order may bring them together
    beside = max(document_length(d, patch_size) - len(c) for (d,), c in zip(rows, captions, strict=True))
    length = max(map(len, captions)) + beside
    batch = collate(rows, length, patch_size, special, torch.Generator())
    index = torch.tensor([1 + (first is not None) for first in firsts], device="cpu").cumsum(0) - 1
    placed = torch.zeros(batch.num_images, dtype=torch.float32, device="cpu").index_copy(0, index, times.float().cpu())
    return replace(batch, times=placed, noise_seed=torch.tensor(noise_seed, dtype=torch.int64, device="cpu")), index
