"""`denoise` against the loop written plainly, and against networks that are rigged."""

import random

import pytest
import torch
from einops import rearrange
from rigged import (
    BOI,
    BOS,
    EOI,
    GOOD,
    PATCH,
    SCHEDULERS,
    SHAPE,
    contexts,
    random_model,
    rows_by_hand,
    scheduler_of,
    text,
)

from transfusion.diffusion.sampler import make_scheduler
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.generation import denoise, generate_text
from transfusion.generation.image import guide
from transfusion.kernels.testing import judge
from transfusion.sequence import Image


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(("prediction", "name"), SCHEDULERS)
@torch.no_grad()
def test_denoise_is_the_loop_written_plainly(prediction, name, which, seed):
    model = random_model(seed, prediction)
    context = contexts()[which]
    scheduler, schedule = scheduler_of(model, name), model.config.schedule
    result = denoise(model, [context], SHAPE, scheduler=scheduler, steps=4, seeds=[seed])

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, *SHAPE, generator=generator)
    batch, hidden = rows_by_hand(model, (*context, Image(latents[0])))
    count, unit = batch.num_images, 1.0
    if schedule.path == "flow":
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    elif schedule.path == "trigflow":
        scheduler.set_timesteps(4, intermediate_timesteps=None)
        unit = schedule.sigma_data
    else:
        scheduler.set_timesteps(4)
    latents = latents * unit
    for t in scheduler.timesteps[:4]:
        timestep = torch.zeros(count, dtype=torch.int64 if schedule.path == "cosine" else torch.float32)
        timestep[-1] = t
        states = hidden(torch.cat([batch.latents[:-1], latents]), timestep).flatten(0, 1)
        decoded = model.codec.decode(states[batch.image_rows.view(count, -1)[-1:]])
        predicted = rearrange(decoded, "i (y x) (p q c) -> i c (y p) (x q)", p=PATCH, q=PATCH, y=SHAPE[1] // PATCH)
        latents = scheduler.step(unit * predicted, t, latents, generator=[generator]).prev_sample
    assert torch.equal(result, latents), seed
    assert result.isfinite().all() and result.dtype == torch.float32


@pytest.mark.parametrize(("prediction", "name"), SCHEDULERS)
def test_a_network_that_knows_the_latents_recovers_them(prediction, name, seed, monkeypatch):
    """Through patches and back; the tokens of one image must not reach another's."""
    model = random_model(seed, prediction)
    schedule, clean = model.config.schedule, torch.randn(3, *SHAPE)
    tokens = rearrange(clean, "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH)
    seen = {}

    def hidden(batch, patches, timestep, impl):
        alpha, sigma, data_weight, noise_weight = (c.view(-1, 1, 1) for c in schedule.coefficients(timestep))
        seen["prediction"] = data_weight * tokens + noise_weight * (patches - alpha * tokens) / sigma
        return torch.zeros(*batch.token_ids.shape, model.config.dim)

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model.codec, "decode", lambda states: seen["prediction"])
    prompts = [(text(BOS, 5),), (text(BOS),), (text(BOS, 6, 7, 8),)]

    def recovered(seeds):
        return denoise(model, prompts, SHAPE, scheduler=scheduler_of(model, name), steps=10, seeds=seeds)

    others = [recovered([seed + 3 * i, seed + 3 * i + 1, seed + 3 * i + 2]) for i in range(1, 5)]
    verdict = judge(recovered([seed, seed + 1, seed + 2]), others, clean.double())
    assert verdict.passed and verdict.bound < 1e-2 * clean.abs().max(), (seed, verdict)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(name, guidance_scale, seed):
    """A float64 network gives in a batch what it gives alone, far closer than a float32 one comes to it alone."""
    model = random_model(seed)
    prompts, seeds = contexts(), [seed + i for i in range(4)]
    options = {"scheduler": scheduler_of(model, name), "steps": 5, "guidance_scale": guidance_scale}

    def alone():
        return torch.cat([denoise(model, [prompts[i]], SHAPE, seeds=[seeds[i]], **options) for i in range(4)])

    single, _ = alone(), model.double()
    together = denoise(model, prompts, SHAPE, seeds=seeds, **options)
    verdict = judge(together, single, alone().double(), factor=1.0)
    assert verdict.passed and verdict.bound < 1e-2, (seed, verdict)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_guidance_is_one_forward_of_both_branches(seed, monkeypatch):
    model, scale = random_model(seed), random.Random(seed).uniform(0, 8)
    prompts = contexts()
    calls = []

    def record(batch, patches, timestep, impl):
        calls.append((batch, timestep))
        return torch.zeros(*batch.token_ids.shape, model.config.dim)

    table = torch.randn(8, 6, model.config.patch_dim)
    monkeypatch.setattr(model, "hidden", record)
    monkeypatch.setattr(model.codec, "decode", lambda states: table[: len(states)])
    one_step = scheduler_of(model, "ddim")
    results = []
    monkeypatch.setattr(
        type(one_step), "step", lambda self, prediction, *a, **k: results.append(prediction) or (prediction,)
    )
    denoise(model, prompts, SHAPE, scheduler=one_step, steps=2, seeds=[0] * 4, guidance_scale=scale)
    as_image = rearrange(table, "i (y x) (p q c) -> i c (y p) (x q)", p=PATCH, q=PATCH, y=SHAPE[1] // PATCH)
    conditional, unconditional = as_image[:4], as_image[4:]
    assert len(calls) == 2 and torch.equal(results[0], unconditional + scale * (conditional - unconditional))
    batch, timestep = calls[0]
    assert batch.token_ids.shape[0] == 8
    for row in batch.token_ids[4:]:
        assert row.tolist()[:9] == [BOS, BOI, *[0] * 6, EOI] and (row[9:] == 0).all()
    # three images of the contexts are clean, the last one of each row is not
    assert timestep.tolist() == [999, 0, 999, 999, 0, 0, 999, 999, 999, 999, 999]


def test_without_guidance_there_is_no_unconditional_row(seed, monkeypatch):
    model, rows = random_model(seed), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda batch, *rest: rows.append(len(batch.token_ids)) or hidden(batch, *rest))
    options = {"scheduler": scheduler_of(model), "steps": 2, "seeds": [0, 1]}
    denoise(model, contexts()[:2], SHAPE, guidance_scale=1.0, **options)
    denoise(model, contexts()[:2], SHAPE, guidance_scale=1.5, **options)
    assert rows == [2, 2, 4, 4]


def test_guidance_zero_is_the_unconditional_model(seed):
    model = random_model(seed).double()
    options = {"scheduler": scheduler_of(model), "steps": 4, "seeds": [seed]}
    ignored = denoise(model, contexts()[2:3], SHAPE, guidance_scale=0.0, **options)
    empty = denoise(model, [(text(BOS),)], SHAPE, **options)
    single = denoise(model.float(), [(text(BOS),)], SHAPE, **options)
    verdict = judge(ignored, single, empty.double())
    assert verdict.passed, (seed, verdict)


def test_guide_formula(seed):
    torch.manual_seed(seed)
    conditional, unconditional = torch.randn(2, 5, 3)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert torch.equal(guide(conditional, unconditional, 2.5), unconditional + 2.5 * (conditional - unconditional))


def test_clean_images_of_the_context_are_what_they_were(seed, monkeypatch):
    model = random_model(seed)
    context = contexts()[3]
    seen, hidden = [], model.hidden

    def record(batch, patches, timestep, impl):
        seen.append((patches, timestep))
        return hidden(batch, patches, timestep, impl)

    monkeypatch.setattr(model, "hidden", record)
    denoise(model, [context], SHAPE, scheduler=scheduler_of(model), steps=4, seeds=[seed])
    generate_text(model, [context], max_new_tokens=1)
    clean = torch.stack([segment.latent for segment in context if isinstance(segment, Image)])
    expected = rearrange(clean, "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH)
    assert len(seen) == 5
    assert all(torch.equal(patches[:2], expected) and timestep[:2].tolist() == [0, 0] for patches, timestep in seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": []}, "no contexts"),
        ({"contexts": [()]}, "context 0 must begin with a Text.*begins with nothing"),
        ({"contexts": [GOOD, (Image(torch.zeros(SHAPE)),)]}, "context 1 must begin with a Text.*an image"),
        ({"contexts": [(text(7, 8),)]}, r"context 0 must begin.*BOS \(1\).*tokens \[7, 8\]"),
        ({"contexts": [(text(),)]}, r"context 0 must begin.*tokens \[\]"),
        ({"contexts": [(text(BOS, 24),)]}, r"token ids 1\.\.24, outside the vocabulary of 24"),
        ({"contexts": [(text(BOS, -1),)]}, r"token ids -1\.\.1, outside"),
        ({"contexts": [(text(BOS), Image(torch.zeros(3, 4, 5)))]}, r"latent of shape \(3, 4, 5\) does not fit"),
        ({"contexts": [(text(BOS), Image(torch.zeros(3, 4, 4)))]}, r"\(3, 4, 4\), the new image is \(3, 4, 6\)"),
        ({"contexts": [(text(BOS, BOI),)]}, "context 0 ends with BOI"),
        ({"latent_shape": (3, 5, 6)}, r"\(3, 5, 6\) does not fit.*\(3, h, w\).*patch size 2"),
        ({"latent_shape": (4, 4, 6)}, r"\(4, 4, 6\) does not fit"),
        ({"latent_shape": (3, 0, 6)}, r"\(3, 0, 6\) does not fit"),
        ({"latent_shape": (4, 6)}, r"\(4, 6\) does not fit"),
        ({"guidance_scale": -0.5}, r"guidance_scale=-0.5 must be a number >= 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"steps": 0}, r"steps=0 must be within 1\.\.1000"),
        ({"steps": 1001}, r"steps=1001 must be within 1\.\.1000"),
        ({"seeds": [1, 2]}, "2 seeds for 1 contexts"),
        ({"scheduler": make_scheduler(NoiseSchedule("epsilon"))}, "prediction_type='epsilon'"),
    ],
)
def test_denoise_refuses(change, message, seed):
    model = random_model(seed).train()
    arguments = {
        "contexts": [GOOD],
        "latent_shape": SHAPE,
        "scheduler": scheduler_of(model),
        "steps": 2,
        "seeds": range(len(change.get("contexts", [GOOD]))),
    }
    with pytest.raises(ValueError, match=message):
        denoise(model, **(arguments | change))
    assert model.training
