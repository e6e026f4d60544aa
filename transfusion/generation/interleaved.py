"""Text until BOI, denoise an image, EOI, text again, until EOS: a document goes on by itself.

The loop of arXiv 2408.11039, section 3.3. The text after an image sees its clean latent, at timestep 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion.generation.image import denoise
from transfusion.generation.rows import check_contexts
from transfusion.generation.text import generate_text
from transfusion.model import Transfusion
from transfusion.sequence import Document, Image, Text


def generate(
    model: Transfusion,
    prompt: Document,
    *,
    latent_shape: Sequence[int],
    max_new_tokens: int,
    max_images: int,
    scheduler: Any,
    steps: int,
    guidance_scale: float = 1.0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    impl: str = "auto",
    progress: bool = False,
) -> Document:
    """-> the prompt and what follows it: a document whose text and image segments alternate as the model wills.

    BOI and EOI are not in its text; they come with each image. It ends with EOS, after `max_new_tokens` tokens of
    text (each BOI counted), or where the model asks for one image more than `max_images`. Generated latents are on
    the CPU. The arguments are those of `generate_text` and `denoise`, which also say what is raised; `seed` is for
    all draws of the document.
    """
    check_contexts(model, [prompt])
    if max_images < 0:
        raise ValueError(f"max_images={max_images} must be at least 0")
    seeds = torch.Generator().manual_seed(seed)
    special, document, room, images = model.config.special, prompt, max_new_tokens, 0
    while True:
        (tokens,) = generate_text(
            model,
            [document],
            max_new_tokens=room,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[_next_seed(seeds)],
            impl=impl,
        )
        room -= len(tokens)
        wants_image = bool(tokens[-1] == special.boi)
        document = _with_text(document, tokens[:-1] if wants_image else tokens)
        if not wants_image or images == max_images:
            return document
        (latent,) = denoise(
            model,
            [document],
            latent_shape,
            scheduler=scheduler,
            steps=steps,
            guidance_scale=guidance_scale,
            seeds=[_next_seed(seeds)],
            impl=impl,
            progress=progress,
        )
        document, images = (*document, Image(latent.cpu())), images + 1
        if not room:
            return document


def _next_seed(seeds: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=seeds))


def _with_text(document: Document, token_ids: Tensor) -> Document:
    """The document with more text: one segment with the text before it, none where there is nothing to add."""
    if not len(token_ids):
        return document
    *before, last = document
    if isinstance(last, Text):
        return (*before, Text(torch.cat([last.token_ids, token_ids])))
    return (*document, Text(token_ids))
