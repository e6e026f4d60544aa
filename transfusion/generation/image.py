"""prediction = unconditional + scale·(conditional - unconditional): images after documents so far.

Classifier-free guidance of Ho & Salimans 2022 (arXiv 2207.12598), the unconditional document being the one that
caption dropout leaves in training: BOS, then the image.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion.diffusion.sampler import sample
from transfusion.generation.rows import Rows, check_contexts, check_latent_shape, inference
from transfusion.model import Transfusion
from transfusion.sequence import Document, Image, Text


def denoise(
    model: Transfusion,
    contexts: Sequence[Document],
    latent_shape: Sequence[int],
    *,
    scheduler: Any,
    steps: int,
    seeds: Sequence[int],
    guidance_scale: float = 1.0,
    impl: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Context i + one new image of pure noise, denoised in place -> latents (I, C, h, w) float32.

    All rows, and with guidance their unconditional twins, go through the network in one batch. An image depends on
    its own context and seed alone: in another batch it comes out the same up to float rounding, and its noise is the
    same on every device.

    Args:
        model: in any mode, which is kept.
        contexts: I documents so far, each a Text that begins with BOS, then any Text and clean Image segments. BOI
            is not among them: it comes with the image.
        latent_shape: (C, h, w) of the new images, and of those in the contexts.
        scheduler: of `make_scheduler`, or any other of diffusers that fits the model's schedule; not changed.
        steps: of denoising. The paper takes 250 of 1000.
        seeds: I ints, of the noise that image i starts from and of what its scheduler adds.
        guidance_scale: 1 is the model as trained, without unconditional rows; the paper takes 3 and 5.
        impl: of the kernels.
        progress: show a bar.

    Raises:
        ValueError: an argument that does not fit, named with the fix.
        FloatingPointError: a prediction that is not finite, naming the step.
    """
    check_contexts(model, contexts)
    _check_new_images(model, contexts, latent_shape)
    if len(seeds) != len(contexts):
        raise ValueError(f"{len(seeds)} seeds for {len(contexts)} contexts; give one of each")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale={guidance_scale} must be a number >= 0; 1 turns guidance off")
    count, guided = len(contexts), guidance_scale != 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(tuple(latent_shape), generator=generator) for generator in generators])
    unconditional = (Text(torch.tensor([model.config.special.bos])),)
    documents = [*contexts, *([unconditional] * count if guided else [])]
    rows = Rows(model, [(*document, Image(noise[0])) for document in documents], impl)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        if not guided:
            return rows.predict(latents, timestep)
        both = rows.predict(latents.repeat(2, 1, 1, 1), timestep.repeat(2))
        return guide(both[:count], both[count:], guidance_scale)

    with inference(model):
        return sample(
            predict,
            noise.to(rows.device),
            schedule=model.config.schedule,
            scheduler=scheduler,
            steps=steps,
            generators=generators,
            progress=progress,
        )


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale·(conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def _check_new_images(model: Transfusion, contexts: Sequence[Document], latent_shape: Sequence[int]) -> None:
    check_latent_shape(model, latent_shape)
    for index, context in enumerate(contexts):
        for segment in context:
            if isinstance(segment, Image) and tuple(segment.latent.shape) != tuple(latent_shape):
                raise ValueError(
                    f"context {index} holds a latent of shape {tuple(segment.latent.shape)}, the new image is "
                    f"{tuple(latent_shape)}; the images of one batch must have one shape"
                )
        last = context[-1]
        if isinstance(last, Text) and len(last.token_ids) and last.token_ids[-1] == model.config.special.boi:
            raise ValueError(f"context {index} ends with BOI, which comes with the image; leave it out")
