"""Does the model read its captions, and predict its text? Held-out losses, and the conditioning gap.

    gap_i = loss_i(another image's caption) - loss_i(its own caption)      same image, noise and timesteps

A model can reach a low diffusion loss and ignore every caption; then the gap is zero. Its standard error is taken
over images, each image's draws averaged first, for draws of one image are not independent.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.data import Autoencoder, evaluation_batch, mismatched, text_documents, to_tensor
from transfusion.data.drafting import caption_ids
from transfusion.data.packing import pack, seeded
from transfusion.data.sources import CaptionedImage, ImageSource, SampleError, TextSource
from transfusion.data.tokenizer import Tokenizer
from transfusion.data.transforms import Size, nearest_size
from transfusion.kernels import diffusion_loss
from transfusion.model import Transfusion
from transfusion.sequence import Batch, collate, document_length

logger = logging.getLogger(__name__)

_MAX_IMAGES = 256
_MAX_WINDOWS = 64
_ROWS = 16  # of a batch


@torch.inference_mode()
def text_figures(model: Transfusion, tokenizer: Tokenizer, texts: TextSource, row_length: int) -> dict[str, float]:
    """Next-token loss on at most 64 windows of `texts`, beside the entropy of their own token frequencies, in nats.

    No model that ignores context can go below that entropy on these windows.
    """
    special, patch = tokenizer.special, model.config.patch_size
    windows = [w for i in range(len(texts)) for w in text_documents(tokenizer.encode(texts[i]), row_length, special)]
    spread = windows[:: max(1, -(-len(windows) // _MAX_WINDOWS))]
    rows = pack([document_length(window, patch) for window in spread], row_length)
    nats, targets = 0.0, []
    for first in range(0, len(rows), _ROWS):
        documents = [[spread[i] for i in row] for row in rows[first : first + _ROWS]]
        batch = collate(documents, row_length, patch, special, torch.Generator())
        batch = batch.to(model.head.weight.device)
        nats += model(batch).text.item() * len(batch.text_targets)
        targets.append(batch.text_targets.cpu())
    counts = torch.bincount(torch.cat(targets)).double()
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum().item()
    tokens = int(counts.sum())
    loss = nats / tokens
    perplexity = float(torch.tensor(loss, dtype=torch.float32, device="cpu").exp())
    return {"loss": loss, "unigram_entropy": entropy, "perplexity": perplexity, "tokens": tokens}


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. count - 1, spread evenly."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]


def pictures(sample: CaptionedImage, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
    """What a sample shows, each (3, H, W) in [-1, 1], of that of `sizes` which training crops it to: the one closest to
    the last picture's shape. Raises `SampleError` for what cannot be read."""
    shown = [each.image for each in sample.pictures]
    size = nearest_size(*shown[-1].size, sizes)
    return tuple(to_tensor(image, size) for image in shown)


class Samples(NamedTuple):
    """Captions as token ids, clean latents (C, h, w), each of its size, and of an edit the latent before it."""

    captions: list[Tensor]
    latents: list[Tensor]
    before: list[Tensor | None]


def read_images(
    images: ImageSource,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder,
    sizes: Sequence[Size],
    longest: Callable[[int], int],
) -> tuple[Samples, int]:
    """-> at most 256 samples, without those that cannot be used, which are named in the log; and how many these are.

    They are spread evenly over the images, so that each source of a mixture has its part. sizes: (height, width) in
    pixels; each image is cropped to the one that training crops it to. longest: tokens of a caption, by sample.
    """
    captions, latents, before = list[Tensor](), list[Tensor](), list[Tensor | None]()
    skipped = 0
    for index in evenly(len(images), _MAX_IMAGES):
        try:
            ids = caption_ids(tokenizer, images.captions[index], longest(index))
            *first, last = pictures(images[index], sizes)
        except ValueError as error:  # a SampleError is one, and names itself
            skipped += 1
            name = "" if isinstance(error, SampleError) else f"{images.names[index]}: "
            logger.warning("skipped %s%s", name, error)
            continue
        captions.append(ids)
        latents.append(autoencoder.encode(last[None])[0])
        before.append(autoencoder.encode(first[0][None])[0] if first else None)
    return Samples(captions, latents, before), skipped


def image_figures(model: Transfusion, samples: Samples, draws: int, seed: int) -> dict[str, Any]:
    """Diffusion loss with right captions, of the whole path and of each of its `draws` parts, and of predicting zero;
    with shuffled captions, and the gap with its standard error; or why there are none to shuffle. Of no
    samples only that there are none.

    Raises `ValueError` for fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}; 8 is the usual number")
    if not samples.captions:
        return {"images": 0}
    columns = zip(*(_one_draw(model, samples, d, draws, seed) for d in range(draws)), strict=True)
    by_draw, shuffled_by_draw, zero_by_draw = (torch.stack(column) for column in columns)
    right, shuffled, zero = by_draw.mean(0), shuffled_by_draw.mean(0), zero_by_draw.mean(0)
    figures: dict[str, Any] = {
        "images": len(right),
        "loss": right.mean().item(),
        "loss_by_time": by_draw.mean(1).tolist(),
        "loss_predicting_zero": zero.mean().item(),
    }
    if not shuffled.numel():
        return figures | {"conditioning_gap_missing": f"more than half of the {len(right)} captions are the same"}
    gap = shuffled - right
    error = gap.std() / len(gap) ** 0.5
    return figures | {
        "loss_shuffled_captions": shuffled.mean().item(),
        "conditioning_gap": gap.mean().item(),
        "conditioning_gap_standard_error": error.item(),
        "conditioning_gap_in_standard_errors": (gap.mean() / error).item(),
    }


@torch.inference_mode()
def _one_draw(model: Transfusion, samples: Samples, draw: int, draws: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (I,) of right captions, of shuffled captions (none where most are the same) and of predicting zero, at
    times of the path's `draw`-th part."""
    generator = seeded(seed, "evaluation", draw)
    captions, latents, before = samples
    count, patch, device = len(captions), model.config.patch_size, model.head.weight.device
    times = (draw + torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")) / draws
    noise_seed = int(torch.randint(0, 2**62, (), generator=generator, device="cpu"))

    def batch(shown: Sequence[Tensor]) -> tuple[Batch, Tensor]:
        made, judged = evaluation_batch(shown, latents, times, noise_seed, patch, model.config.special, before)
        return made.to(device), judged

    shuffled = torch.zeros(0, device="cpu")
    if 2 * Counter(tuple(caption.tolist()) for caption in captions).most_common(1)[0][1] <= count:
        others, judged = batch([captions[i] for i in mismatched(captions, generator)])
        shuffled = model(others).per_image.cpu()[judged]
    right, judged = batch(captions)
    return model(right).per_image.cpu()[judged], shuffled, _loss_of_zero(model, right).cpu()[judged]


def _loss_of_zero(model: Transfusion, batch: Batch) -> Tensor:
    """What a model that always predicts zero would score on each image: the mean square of the target."""
    config = model.config
    path = config.schedule.coefficients(config.schedule.timestep(batch.times))
    zero = torch.zeros(batch.image_rows.numel(), config.patch_dim, device=batch.latents.device)
    if isinstance(batch.latents, Tensor):
        zero = zero.unflatten(0, (batch.num_images, -1))
    weights = path.data_weight, path.noise_weight
    return diffusion_loss(zero, batch.latents, *weights, config.patch_size, seed=batch.noise_seed)
