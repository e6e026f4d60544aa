"""Images against the loop written plainly over the whole sequence, and against networks that are rigged."""

import copy
import random

import pytest
import torch
from einops import rearrange
from rigged import (
    BOI,
    BOS,
    GOOD,
    PATCH,
    SCHEDULERS,
    SHAPE,
    contexts,
    image_noise,
    options_of,
    paint,
    plain_denoise,
    plain_prediction,
    random_model,
    rows_by_hand,
    scheduler_of,
    text,
)

from transfusion.config import UNetConfig
from transfusion.data.documents import caption_image_document
from transfusion.diffusion.sampler import Known, make_scheduler, timesteps
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.generation import Guidance, denoise, generate, interleaved, score
from transfusion.generation.rows import Denoiser, Rows
from transfusion.kernels.attention import torch_paths
from transfusion.kernels.testing import judge
from transfusion.sequence import Image, Text


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(("prediction", "name"), SCHEDULERS)
@torch.no_grad()
def test_denoise_is_the_loop_written_plainly(prediction, name, which, seed):
    """A float64 network comes closer to the plain float64 one than the plain float32 one does."""
    model, context = random_model(seed, prediction), contexts()[which]
    scheduler = scheduler_of(model, name)
    eager = plain_denoise(model, context, seed, scheduler_of(model, name))
    model.double()
    (result,) = denoise(model, [context], SHAPE, scheduler=scheduler, steps=4, seeds=[seed])
    gold = plain_denoise(model, context, seed, scheduler_of(model, name))
    verdict = judge(result, eager, gold.double(), factor=1.0)
    assert verdict.passed and verdict.bound < 1e-2 * gold.abs().max(), (seed, verdict)
    assert result.dtype == torch.float32


@pytest.mark.parametrize(("prediction", "name"), SCHEDULERS)
def test_a_network_that_knows_the_latents_recovers_them(prediction, name, seed, monkeypatch):
    """Through patches and back; the tokens of one image must not reach another's."""
    model = random_model(seed, prediction)
    schedule, clean = model.config.schedule, torch.randn(3, *SHAPE)
    tokens = rearrange(clean, "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH)
    seen = {}

    def encode(patches, thousandths, *_):
        timestep = thousandths * (schedule.timestep_range / 1000)
        timestep = timestep.round().long() if schedule.path == "cosine" else timestep
        alpha, sigma, data_weight, noise_weight = (c.view(-1, 1, 1) for c in schedule.coefficients(timestep))
        seen["prediction"] = data_weight * tokens + noise_weight * (patches - alpha * tokens) / sigma
        return torch.zeros(*patches.shape[:2], model.config.dim)

    monkeypatch.setattr(model.codec, "encode", encode)
    monkeypatch.setattr(model.codec, "decode", lambda states: seen["prediction"])
    prompts = [(text(BOS, 5),), (text(BOS),), (text(BOS, 6, 7, 8),)]

    def recovered(seeds):
        return denoise(model, prompts, SHAPE, scheduler=scheduler_of(model, name), steps=10, seeds=seeds)

    others = [recovered([seed + 3 * i, seed + 3 * i + 1, seed + 3 * i + 2]) for i in range(1, 5)]
    verdict = judge(recovered([seed, seed + 1, seed + 2]), others, clean.double())
    assert verdict.passed and verdict.bound < 1e-2 * clean.abs().max(), (seed, verdict)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(name, scale, seed):
    """A float64 network gives in a batch what it gives alone, far closer than a float32 one comes to it alone."""
    model = random_model(seed)
    prompts, seeds = contexts(), [seed + i for i in range(4)]
    options = {"scheduler": scheduler_of(model, name), "steps": 5, "guidance": Guidance(scale)}

    def alone():
        return torch.cat([denoise(model, [prompts[i]], SHAPE, seeds=[seeds[i]], **options) for i in range(4)])

    single, _ = alone(), model.double()
    together = denoise(model, prompts, SHAPE, seeds=seeds, **options)
    verdict = judge(together, single, alone().double(), factor=1.0)
    assert verdict.passed and verdict.bound < 1e-2, (seed, verdict)
    assert (together[0] - together[2]).abs().max() > 0.1


@torch.no_grad()
def test_images_of_other_sizes_in_the_contexts(seed):
    model = random_model(seed)
    small, wide = torch.randn(3, 2, 4), torch.randn(3, 4, 8)
    prompts = [(text(BOS, 7), Image(small), text(8), Image(wide)), (text(BOS), Image(torch.randn(SHAPE)))]
    eager, options = [], {"scheduler": scheduler_of(model), "steps": 4}
    for prompt in prompts:
        rows, _ = Rows.start(model, [(*prompt, Image(torch.zeros(SHAPE)))], 40)
        assert rows.cache.used == [
            sum(len(s.token_ids) if isinstance(s, Text) else 2 + s.latent[0].numel() // 4 for s in prompt) + 8
        ]
        eager.append(denoise(model, [prompt], SHAPE, seeds=[seed], **options))
    together = denoise(model.double(), prompts, SHAPE, seeds=[seed] * 2, **options)
    gold = torch.cat([denoise(model, [prompt], SHAPE, seeds=[seed], **options) for prompt in prompts])
    verdict = judge(together, torch.cat(eager), gold.double(), factor=1.0)
    assert verdict.passed, (seed, verdict)
    other = denoise(model, [(*prompts[0][:3], Image(wide + 1))], SHAPE, seeds=[seed], **options)
    assert not torch.allclose(other[0], together[0])


# ---------------------------------------------------------------- guidance


def recorded(model, monkeypatch):
    """(rows, tokens) of every call of the transformer from now on."""
    calls, transformer = [], model.transformer.forward
    monkeypatch.setattr(
        model.transformer, "forward", lambda x, *rest: calls.append(tuple(x.shape[:2])) or transformer(x, *rest)
    )
    return calls


def test_guidance_is_one_forward_of_both_branches(seed, monkeypatch):
    model, scale = random_model(seed), random.Random(seed).uniform(1.1, 8)
    calls, results = recorded(model, monkeypatch), []
    table = torch.randn(8, 6, model.config.patch_dim)
    monkeypatch.setattr(model.codec, "decode", lambda states: table[: len(states)])
    one_step = scheduler_of(model, "ddim")
    monkeypatch.setattr(
        type(one_step), "step", lambda self, prediction, *a, **k: results.append(prediction) or (prediction,)
    )
    options = {"scheduler": one_step, "steps": 2, "guidance": Guidance(scale)}
    denoise(model, contexts(), SHAPE, seeds=[0] * 4, **options)
    as_image = rearrange(table, "i (y x) (p q c) -> i c (y p) (x q)", p=PATCH, q=PATCH, y=SHAPE[1] // PATCH)
    conditional, unconditional = as_image[:4], as_image[4:]
    assert len(results) == 2 and torch.equal(results[0], unconditional + scale * (conditional - unconditional))
    # the prompts, their BOI; BOS and its BOI once for all rows; then only the image's six tokens, of both branches
    assert calls == [(4, 19), (4, 1), (1, 1), (1, 1), (8, 6), (8, 6)]


def test_without_guidance_there_is_no_unconditional_row(seed, monkeypatch):
    model = random_model(seed)
    calls = recorded(model, monkeypatch)
    denoise(model, contexts()[:2], SHAPE, scheduler=scheduler_of(model), steps=2, seeds=[0, 1])
    assert [rows for rows, _ in calls] == [2, 2, 2, 2]


def test_outside_its_interval_guidance_costs_nothing(seed, monkeypatch):
    model = random_model(seed)
    calls = recorded(model, monkeypatch)
    guidance = Guidance(3.0, interval=(0.3, 0.7))  # times of the five steps: 0.999, 0.799, 0.599, 0.399, 0.199
    options = {"scheduler": scheduler_of(model), "steps": 5, "seeds": [seed, seed + 1]}
    denoise(model, contexts()[:2], SHAPE, guidance=guidance, **options)
    assert [rows for rows, tokens in calls if tokens == 6] == [2, 2, 4, 4, 2]
    free, never, always = (
        denoise(model, contexts()[:1], SHAPE, guidance=each, **{**options, "seeds": [seed]})
        for each in (Guidance(), Guidance(3.0, interval=(0.0, 0.1)), Guidance(3.0))
    )
    assert torch.equal(free, never) and not torch.equal(free, always)


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_an_interval_holds_the_steps_at_its_ends(prediction, seed, monkeypatch):
    """As a user writes them, 800 of 1000 as 0.8, though float32's quotient lies above."""
    model = random_model(seed, prediction)
    calls = recorded(model, monkeypatch)
    scheduler = scheduler_of(model)
    for moment in timesteps(copy.deepcopy(scheduler), model.config.schedule, 5).tolist():
        calls.clear()
        guidance = Guidance(3.0, interval=(moment / 1000, moment / 1000))
        denoise(model, contexts()[:1], SHAPE, guidance=guidance, scheduler=scheduler, steps=5, seeds=[seed])
        assert sum(rows == 2 for rows, tokens in calls if tokens == 6) == 1, moment


def test_an_interval_ends_at_pure_noise_though_trigflow_starts_a_little_above(seed, monkeypatch):
    model = random_model(seed, "trigflow")
    calls = recorded(model, monkeypatch)
    options = {"scheduler": scheduler_of(model), "steps": 2, "seeds": [seed]}
    denoise(model, contexts()[:1], SHAPE, guidance=Guidance(3.0, interval=(0.9, 1.0)), **options)
    assert [rows for rows, tokens in calls if tokens == 6] == [2, 1]


def test_whether_a_step_is_guided_is_known_without_asking_the_device(seed, monkeypatch):
    """A timestep on the device is never read: reading waits for all work before it."""
    model, made = random_model(seed), interleaved._predictor

    def guarded(plan, state):
        predict = made(plan, state)

        def unread(latents, timestep):
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "__float__", "__bool__"):
                    patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read"))
                return predict(latents, timestep)

        return unread

    monkeypatch.setattr(interleaved, "_predictor", guarded)
    monkeypatch.setattr(torch_paths, "_can_look", lambda mask: False)  # as elsewhere than on a CPU
    options = {"scheduler": scheduler_of(model), "steps": 4, "seeds": [seed]}
    denoise(model, contexts()[:1], SHAPE, guidance=Guidance(3.0, interval=(0.3, 0.7)), **options)


def test_guidance_zero_is_the_unconditional_model(seed):
    model = random_model(seed).double()
    options = {"scheduler": scheduler_of(model), "steps": 4, "seeds": [seed]}
    ignored = denoise(model, contexts()[2:3], SHAPE, guidance=Guidance(0.0), **options)
    empty = denoise(model, [(text(BOS),)], SHAPE, **options)
    single = denoise(model.float(), [(text(BOS),)], SHAPE, **options)
    verdict = judge(ignored, single, empty.double())
    assert verdict.passed, (seed, verdict)


@torch.no_grad()
def test_the_unconditional_branch_is_the_document_of_caption_dropout(seed, monkeypatch):
    """Token by token, and in what the network predicts of it: against one forward of that document, nothing cached."""
    model = random_model(seed).double()
    starts, asked, start, both = [], [], Rows.start, Denoiser.both
    monkeypatch.setattr(Rows, "start", lambda *call: starts.append(call[1]) or start(*call))

    def recorded(self, latents, timestep):
        result = both(self, latents, timestep)
        asked.extend(zip(latents.split(1), timestep, result[1], strict=True))
        return result

    monkeypatch.setattr(Denoiser, "both", recorded)
    options = {"scheduler": scheduler_of(model), "steps": 4, "guidance": Guidance(3.0)}
    denoise(model, contexts(), SHAPE, seeds=[seed + i for i in range(4)], **options)
    (twin,) = starts[1]
    dropped = caption_image_document(torch.tensor([7, 8]), torch.randn(SHAPE), drop_caption=True)
    ours, theirs = (rows_by_hand(model, each)[0] for each in ((*twin, Image(torch.randn(SHAPE))), dropped))
    for name in ("token_ids", "positions", "image_rows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.mask.intervals, theirs.mask.intervals)
    found = torch.stack([prediction for *_, prediction in asked])

    def by_hand():
        predict = plain_prediction(model, dropped)
        return torch.cat([predict(latents, t) for latents, t, _ in asked])

    gold, _ = by_hand(), model.float()
    verdict = judge(found, by_hand(), gold.double(), factor=1.0)
    assert len(found) == 16 and verdict.passed and verdict.bound < 1e-2 * gold.abs().max(), (seed, verdict)


def test_clean_images_of_the_context_are_what_they_were(seed, monkeypatch):
    """At timestep 0, and read once; the new image alone is noised."""
    model = random_model(seed)
    context = contexts()[3]
    seen, encode = [], model.codec.encode
    monkeypatch.setattr(
        model.codec, "encode", lambda patches, t, *rest: seen.append((patches, t.tolist())) or encode(patches, t, *rest)
    )
    denoise(model, [context], SHAPE, scheduler=scheduler_of(model), steps=4, seeds=[seed])
    clean = torch.stack([segment.latent for segment in context if isinstance(segment, Image)])
    assert torch.equal(seen[0][0], rearrange(clean, "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH))
    assert [times for _, times in seen] == [[0, 0], [999], [749], [499], [249]]
    noise = rearrange(image_noise(seed)[0][None], "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH)
    assert torch.equal(seen[1][0], noise)


# ---------------------------------------------------------------- inpainting and callbacks


@pytest.mark.parametrize(("prediction", "name"), SCHEDULERS)
def test_inpainting_keeps_what_is_known_and_paints_the_rest(prediction, name, seed):
    """In one batch with a row that has nothing given, which comes out as it does alone."""
    model = random_model(seed, prediction).double()
    unknown = torch.rand(1, *SHAPE[1:]) > 0.5
    given = torch.randn(SHAPE)
    options = options_of(model, scheduler=scheduler_of(model, name), steps=5)
    requests = [paint(text(BOS, 7), seed=seed, known=Known(given, unknown)), paint(text(BOS, 8, 9), seed=seed + 1)]
    (painted,), (free,) = (each.images for each in generate(model, requests, **options))
    assert torch.equal(painted[~unknown.expand(SHAPE)], given[~unknown.expand(SHAPE)])
    (alone,) = generate(model, [requests[1]], **options)[0].images
    plain = plain_denoise(model.float(), requests[1].context, seed + 1, scheduler_of(model, name), steps=5)
    verdict = judge(free, plain, alone.double(), factor=1.0)
    assert verdict.passed, (seed, verdict)
    (whole,) = generate(model.double(), [paint(text(BOS, 7), seed=seed)], **options)[0].images
    assert not torch.allclose(
        whole[unknown.expand(SHAPE)], painted[unknown.expand(SHAPE)]
    )  # the rest fits what is known


def test_a_callback_sees_every_step_and_may_change_the_latents(seed):
    model, seen = random_model(seed), []

    def steer(step, timestep, latents):
        seen.append((step, int(timestep), tuple(latents.shape)))
        return torch.full_like(latents, 0.5) if step == 2 else latents

    options = {"scheduler": scheduler_of(model), "steps": 4, "seeds": [seed, seed + 1]}
    steered = denoise(model, contexts()[:2], SHAPE, on_step_end=steer, **options)
    assert seen == [(i, t, (2, *SHAPE)) for i, t in enumerate([999, 749, 499, 249])]
    assert not torch.equal(steered, denoise(model, contexts()[:2], SHAPE, **options))


# ---------------------------------------------------------------- refusals


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
        ({"contexts": [(text(BOS), Image(torch.full(SHAPE, torch.nan)))]}, "context 0 holds a latent with NaN"),
        ({"contexts": [(text(BOS, BOI),)]}, "context 0 has BOI before an image"),
        ({"contexts": [(text(BOS, BOI), text())]}, "context 0 has BOI before an image"),
        ({"contexts": [(text(BOS, BOI), Image(torch.zeros(SHAPE)))]}, "context 0 has BOI before an image"),
        ({"contexts": [(text(BOS), Image(None))]}, r"an image of context 0 .*\(C, h, w\) .*got NoneType"),
        ({"contexts": [(text(BOS), Image(torch.zeros(SHAPE) * 1j))]}, "an image of context 0 .*got torch.complex64"),
        ({"contexts": [(text(BOS), Image(torch.zeros(SHAPE), None))]}, "max_time of an image of context 0=None"),
        ({"contexts": None, "seeds": []}, "contexts must be a list, got NoneType"),
        ({"seeds": 1}, "seeds must be a list, got int"),
        (
            {"contexts": [GOOD, (text(BOS, *[7] * 90),)], "max_length": 98},
            "context 1 has 91 tokens; with 8 more .*max_length=98",
        ),
        ({"latent_shape": (3, 5, 6)}, r"\(3, 5, 6\) does not fit.*\(3, h, w\).*patch size 2"),
        ({"latent_shape": (4, 4, 6)}, r"\(4, 4, 6\) does not fit"),
        ({"latent_shape": (3, 0, 6)}, r"\(3, 0, 6\) does not fit"),
        ({"steps": 0}, r"steps=0 must be within 1\.\.1000"),
        ({"steps": 1001}, r"steps=1001 must be within 1\.\.1000"),
        ({"seeds": [1, 2]}, "2 seeds for 1 contexts"),
        ({"scheduler": make_scheduler(NoiseSchedule("epsilon"))}, "prediction_type='epsilon'"),
        ({"scheduler": "ddim"}, "'ddim' is no scheduler"),
        ({"scheduler": type(make_scheduler(NoiseSchedule()))}, "is no scheduler"),
        ({"scheduler": None}, "None is no scheduler"),
    ],
)
def test_denoise_refuses(change, message, seed):
    model = random_model(seed).train()
    arguments = {
        "contexts": [GOOD],
        "latent_shape": SHAPE,
        "scheduler": scheduler_of(model),
        "steps": 2,
        "seeds": range(len(change.get("contexts", [GOOD]) or ())),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        denoise(model, **(arguments | change))
    assert model.training


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (Known(torch.zeros(3, 4, 4), torch.ones(1, 4, 6) > 0), r"known of request 0 .*\(3, 4, 4\)"),
        (Known(torch.zeros(SHAPE), torch.ones(SHAPE) > 0), r"known of request 0 .*\(1, 4, 6\)"),
        (Known(torch.zeros(SHAPE), torch.ones(1, 4, 6)), "must be bool.*float32"),
        (Known(None, torch.ones(1, 4, 6) > 0), "known.latents of request 0=None must be a Tensor"),
        (Known(torch.zeros(SHAPE), None), "known.unknown of request 0=None must be a Tensor"),
        ((torch.zeros(SHAPE), torch.ones(1, 4, 6) > 0), r"known of request 0=(?s:.*) must be a Known, got tuple"),
        (False, "known of request 0=False must be a Known, got bool"),
    ],
)
def test_a_known_part_of_another_shape_is_refused(known, message, seed):
    model = random_model(seed)
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, [paint(text(BOS), known=known)], **options_of(model))


def test_the_unet_reads_contexts_of_one_size(seed):
    """Which need not be that of the new image; the linear codec takes any mix."""
    unet = UNetConfig(width=8, deep_width=16, blocks=1, head_dim=8)
    model, linear = random_model(seed, codec="unet", unet=unet), random_model(seed)
    wide, tall = ((text(BOS, 7), Image(torch.randn(3, *sides))) for sides in ((4, 6), (6, 4)))
    for documents, match in (([GOOD, wide, tall], "context 2 .*6, 4.* context 1"), ([wide + tall[1:]], "context 0")):
        requests = [paint(*document) for document in documents]
        with pytest.raises(ValueError, match=f"{match}.* of one size in a call"):
            generate(model, requests, **options_of(model))
        assert len(generate(linear, requests, **options_of(linear))) == len(documents)
    with pytest.raises(ValueError, match=r"context 1 .* of one size in a call"):
        score(model, [wide, tall], [torch.tensor([5])] * 2)
    drawn = generate(model, [paint(*GOOD), paint(*tall), paint(*tall)], **options_of(model))
    assert [tuple(each.images[0].shape) for each in drawn] == [SHAPE] * 3
