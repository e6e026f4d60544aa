"""Transfusion on a batch whose images differ in size: the same losses as on dense batches, and gradients for all."""

import random
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG
from torch import Tensor

from transfusion import Transfusion
from transfusion.kernels import RaggedLatents
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.sequence import Batch, Image, SpecialTokens, Text, collate

# In float64, what two orders of summation may differ by after a few thousand operations; a wrong token, timestep or
# noise moves a loss by far more.
ROUNDING = 2.0**-36
CHANNELS = CONFIG.latent_channels


def fresh_model() -> Transfusion:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return Transfusion(CONFIG).double()


def packed(*sizes: tuple[int, int], first: Tensor | None = None) -> Batch:
    """One row: for each image a document of two text tokens and the image."""
    images = [torch.randn(CHANNELS, *size) for size in sizes]
    if first is not None:
        images[0] = first
    rows = [[(Text(torch.tensor([7, 9])), Image(image), Text(torch.tensor([2]))) for image in images]]
    return collate(rows, 100, CONFIG.patch_size, SpecialTokens(), torch.Generator().manual_seed(5))


def close(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= ROUNDING * other.abs().max()).all())


def wide(batch: Batch) -> Batch:
    latents = batch.latents
    double = latents.with_values(latents.values.double()) if isinstance(latents, RaggedLatents) else latents.double()
    return replace(batch, latents=double)


def test_equal_sizes_give_the_losses_of_the_dense_batch() -> None:
    model, batch = fresh_model(), packed((4, 6), (4, 6), (4, 6))
    dense = wide(batch)
    assert isinstance(dense.latents, Tensor)
    results = []
    for each in (dense, replace(dense, latents=RaggedLatents.pack(list(dense.latents)))):
        losses = model(each)
        results.append((losses, torch.autograd.grad(losses.total, list(model.parameters()))))
    (one, one_grads), (other, other_grads) = results
    assert close(other.per_image, one.per_image) and close(other.total, one.total)
    assert all(close(a, b) for a, b in zip(other_grads, one_grads, strict=True))


def test_an_image_has_the_loss_it_has_alone() -> None:
    """Its document sees no other; the noise of the first image is the same whatever follows it."""
    model = fresh_model()
    alone = packed((4, 6))
    assert isinstance(alone.latents, Tensor)
    together = packed((4, 6), (8, 4), (2, 2), first=alone.latents[0])
    assert isinstance(together.latents, RaggedLatents)
    times = torch.cat([alone.times, together.times[1:]])
    together = replace(together, times=times, noise_seed=alone.noise_seed)
    assert close(model(wide(together)).per_image[:1], model(wide(alone)).per_image)


@pytest.mark.skipif(not TRITON_INTERPRET and not torch.cuda.is_available(), reason="needs the interpreter or a GPU")
def test_the_kernels_train_on_it() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fresh_model().float().to(device)
    batch = packed((4, 6), (8, 4), (2, 2)).to(device)
    losses = model(batch, "triton")
    losses.total.backward()
    assert losses.per_image.shape == (3,) and losses.total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
