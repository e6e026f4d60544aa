"""The U-Net codec: shapes, what a skip connection is worth, that it learns, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from transfusion import Transfusion
from transfusion.config import ModelConfig
from transfusion.generation.rows import Denoiser, Rows, inference
from transfusion.kernels.patchify_noise.reference import patchify, unpatchify
from transfusion.kernels.testing import judge
from transfusion.model.unet_codec import UNetCodec
from transfusion.sequence import Image, SpecialTokens, Text, collate

CONFIG, batch_of = tiny.UNET, tiny.image_batch


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(("patch_size", "sides"), [(2, (4, 6)), (4, (8, 4)), (8, (16, 8))])
def test_every_parameter_of_every_shape_learns(patch_size: int, sides: tuple[int, int], skips: bool) -> None:
    model = tiny.model(replace(CONFIG, patch_size=patch_size, unet=replace(CONFIG.unet, skips=skips)))
    losses = model(batch_of(patch_size, sides))
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert losses.per_image.shape == (2,)


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_the_way_up_sees_the_transformer_alone(skips: bool) -> None:
    codec = tiny.model(replace(CONFIG, unet=replace(CONFIG.unet, skips=skips))).codec
    pixels = torch.randn(1, 16, 3, requires_grad=True)
    tokens, kept = codec.encode(pixels, torch.tensor([500]), (4, 4))
    prediction = codec.decode(torch.randn_like(tokens), kept)
    (grad,) = torch.autograd.grad(prediction.sum(), pixels, allow_unused=True, materialize_grads=True)
    assert tokens.shape == (1, 4, 32) and prediction.shape == pixels.shape
    assert bool((grad != 0).any()) == skips


def test_a_prediction_depends_on_its_timestep_and_on_no_other_image() -> None:
    """A float64 codec gives in a batch what it gives alone, closer than a float32 one comes to it."""
    codec, pixels = tiny.model(CONFIG).codec, torch.randn(2, 16, 3)

    def through(pixels: torch.Tensor, timestep: list[int]) -> torch.Tensor:
        tokens, skips = codec.encode(pixels, torch.tensor(timestep), (4, 4))
        return codec.decode(tokens, skips).detach()

    eager = through(pixels[1:], [700])
    codec.double()
    both, alone = through(pixels.double(), [10, 700]), through(pixels[1:].double(), [700])
    verdict = judge(both[1:], eager, alone, factor=1.0)
    assert verdict.passed and verdict.bound < 1e-3 * alone.abs().max(), verdict
    assert (both[1:] - through(pixels[1:].double(), [10])).abs().max() > 100 * verdict.bound


def test_pixels_tokens_and_predictions_are_row_major() -> None:
    """In a long and narrow image a pixel reaches the tokens and pixels around it, in rows and columns, not those far
    away; so a mix-up of height and width shows."""
    unet = replace(CONFIG.unet, attention=False)
    codec = tiny.model(replace(CONFIG, unet=unet)).codec
    pixels = torch.randn(1, 4 * 64, 3, requires_grad=True)
    tokens, skips = codec.encode(pixels, torch.tensor([500]), (4, 64))
    prediction = codec.decode(tokens, skips)
    for output, row in ((tokens, 32), (prediction, 64)):
        (grad,) = torch.autograd.grad(output[0, row].sum(), pixels, retain_graph=True)  # the second row's first
        reached = (grad[0] != 0).any(-1).view(4, 64)
        assert reached[:, :4].all() and not reached[:, 48:].any()


def test_text_alone_needs_no_codec() -> None:
    text = collate([[(Text(torch.tensor([1, 5, 2])),)]], 8, 2, SpecialTokens(), torch.Generator())
    losses = tiny.model(CONFIG)(text)
    assert losses.image == 0 and losses.text > 0


def test_it_learns_a_batch_by_heart() -> None:
    model = tiny.model(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        batch = replace(batch_of(), noise_seed=torch.tensor(step))
        loss = model(batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses


def test_kernels_and_references_give_the_same_losses_and_gradients() -> None:
    batch, results = batch_of().to(tiny.DEVICE), []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        model = tiny.model(CONFIG).to(tiny.DEVICE, dtype)
        losses = model(replace(batch, latents=batch.latents.to(dtype)), impl)
        losses.total.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((torch.stack([losses.text, losses.image]).detach(), grads))
    for actual, eager, gold in zip(*results, strict=True):
        verdict = judge(actual, eager, gold.double())
        assert verdict.passed, verdict


def test_a_batch_compiles_whole() -> None:
    torch._dynamo.reset()
    model, batch = tiny.model(CONFIG), batch_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch).total, model(batch).total)


@pytest.mark.parametrize("changes", [{}, {"codec": "linear"}, {"image_positions": "grid"}], ids=str)
def test_generation_sees_what_training_sees(changes: dict[str, Any]) -> None:
    """A denoising step over the cache predicts what one pass over the whole sequence does, and so does the token that
    follows the image."""
    model, latent, timestep = tiny.model(replace(CONFIG, **changes)), torch.randn(1, 3, 4, 6), torch.tensor([300])
    clean, window = torch.tensor([0]), model.config.codec_window
    document = (Text(torch.tensor([1, 7, 8])), Image(latent[0]))
    batch = collate([[document]], 11, 2, SpecialTokens(), torch.Generator())

    def whole() -> tuple[torch.Tensor, torch.Tensor]:
        patches = patchify(latent.to(model.head.weight.dtype), window)
        _, skips = model.encode_images(patches, timestep, latent.shape[-2:])
        states = model.hidden(batch, patches, timestep, "reference").flatten(0, 1)
        prediction = model.decode_images(states[batch.image_rows][None], skips)
        after = model.head(model.hidden(batch, patches, clean, "reference")[0, -1])
        return unpatchify(prediction, latent.shape, window), after

    with inference(model):
        eager = whole()
        model.double()
        rows, _ = Rows.start(model, [(Text(torch.tensor([1, 7, 8, 3])),)], capacity=16, impl="reference")
        stepwise = Denoiser(rows, (3, 4, 6))(latent.double(), timestep), rows.commit(latent.double())[0]
        gold = whole()
    for actual, one, exact in zip(stepwise, eager, gold, strict=True):
        verdict = judge(actual, one, exact, factor=1.0)
        assert verdict.passed and verdict.bound < 1e-3 * exact.abs().max(), verdict


def test_images_of_different_sizes_are_refused() -> None:
    documents = [(Text(torch.tensor([1])), Image(torch.randn(3, *sides))) for sides in ((4, 4), (4, 8))]
    ragged = collate([documents], 24, 2, SpecialTokens(), torch.Generator())
    with pytest.raises(ValueError, match="U-Net codec takes images of one size"):
        tiny.model(CONFIG)(ragged)
    tiny.model(tiny.CONFIG)(ragged)  # which the linear codec takes


@pytest.mark.parametrize("patch_size", [1, 3, 6])
def test_patch_sizes_that_are_no_power_of_two_are_refused(patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"must be 2, 4, 8, ..., got {patch_size}"):
        replace(CONFIG, patch_size=patch_size)


def test_sides_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="6x4 do not divide into patches of 4"):
        UNetCodec(replace(CONFIG, patch_size=4)).encode(torch.zeros(1, 24, 3), torch.zeros(1), (6, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 0}, "width must be at least 1"), ({"deep_width": 40}, "deep_width 40 does not split into heads of 64")],
)
def test_bad_sizes_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ModelConfig().unet, **changes)


def test_save_and_load(tmp_path) -> None:
    model = tiny.model(CONFIG)
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(batch_of()).total, model(batch_of()).total)
