"""Images after documents, text after documents, and both in turn: against loops written plainly and rigged networks."""

import random
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from transfusion.config import ModelConfig
from transfusion.diffusion.sampler import make_scheduler
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.generation import denoise, generate, generate_text
from transfusion.generation.image import guide
from transfusion.generation.text import token_probabilities
from transfusion.kernels.testing import judge
from transfusion.model import Transfusion
from transfusion.sequence import Image, SpecialTokens, Text, collate, document_length

BOS, EOS, BOI, EOI = 1, 2, 3, 4
SPECIAL = SpecialTokens()
VOCABULARY, PATCH, SHAPE = 24, 2, (3, 4, 6)
SCHEDULERS = [
    ("epsilon", "ddim"),
    ("epsilon", "ddpm"),
    ("v_prediction", "ddim"),
    ("v_prediction", "ddpm"),
    ("v_prediction", "dpmsolver"),
    ("flow_prediction", "euler"),
    ("trigflow", "scm"),
]


@pytest.fixture
def seed():
    return random.randrange(2**62)


def tiny(seed, prediction="v_prediction"):
    """A model whose random weights are large enough for every token to matter to every later one."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        dim=32,
        layers=2,
        heads=2,
        latent_channels=SHAPE[0],
        patch_size=PATCH,
        schedule=NoiseSchedule(prediction),
    )
    model = Transfusion(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def text(*ids):
    return Text(torch.tensor(ids, dtype=torch.int64))


def contexts():
    """Documents so far of unequal lengths, two of them with images; drawn from the global generator."""
    image, other = torch.randn(2, *SHAPE)
    return [
        (text(BOS, 7),),
        (text(BOS), Image(image), text(9, 10, 11)),
        (text(BOS, 12, 13, 14, 15, 16),),
        (text(BOS, 8), Image(other), text(17), Image(image)),
    ]


def scheduler_of(model, name=None):
    return make_scheduler(model.config.schedule, name)


def rows_by_hand(model, document):
    """One document as a batch of one row, its tokens in patches, and its network evaluated: nothing of ours between."""
    batch = collate([[document]], document_length(document, PATCH), PATCH, SPECIAL, torch.Generator())

    def hidden(latents, timestep):
        patches = rearrange(latents, "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH)
        return model.hidden(replace(batch, latents=latents), patches, timestep)

    return batch, hidden


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(("prediction", "name"), SCHEDULERS)
@torch.no_grad()
def test_denoise_is_the_loop_written_plainly(prediction, name, which, seed):
    model = tiny(seed, prediction)
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
    model = tiny(seed, prediction)
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
    model = tiny(seed)
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
    model, scale = tiny(seed), random.Random(seed).uniform(0, 8)
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
    model, rows = tiny(seed), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda batch, *rest: rows.append(len(batch.token_ids)) or hidden(batch, *rest))
    options = {"scheduler": scheduler_of(model), "steps": 2, "seeds": [0, 1]}
    denoise(model, contexts()[:2], SHAPE, guidance_scale=1.0, **options)
    denoise(model, contexts()[:2], SHAPE, guidance_scale=1.5, **options)
    assert rows == [2, 2, 4, 4]


def test_guidance_zero_is_the_unconditional_model(seed):
    model = tiny(seed).double()
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
    model = tiny(seed)
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


# ---------------------------------------------------------------- text


@torch.no_grad()
def plain_greedy(model, context, limit):
    tokens = []
    while len(tokens) < limit and not (tokens and tokens[-1] in (EOS, BOI)):
        batch, hidden = rows_by_hand(model, (*context, text(*tokens)))
        timestep = torch.zeros(batch.num_images, dtype=torch.int64)
        tokens.append(int(model.head(hidden(batch.latents, timestep)[0, -1]).argmax()))
    return tokens


def test_greedy_text_is_the_loop_written_plainly(seed):
    """In float64, where no rounding decides between two tokens."""
    model = tiny(seed).double()
    prompts = contexts()
    result = generate_text(model, prompts, max_new_tokens=8)
    assert [row.tolist() for row in result] == [plain_greedy(model, prompt, 8) for prompt in prompts], seed


def test_sampling_one_token_of_many_is_greedy(seed):
    model = tiny(seed).double()
    options = {"max_new_tokens": 6, "temperature": 1.3, "seeds": [seed + i for i in range(4)]}
    prompts = contexts()
    greedy = [row.tolist() for row in generate_text(model, prompts, max_new_tokens=6)]
    assert [row.tolist() for row in generate_text(model, prompts, top_k=1, **options)] == greedy, seed
    assert [row.tolist() for row in generate_text(model, prompts, top_p=1e-9, **options)] == greedy, seed


def test_sampled_text_depends_on_its_seed_alone(seed):
    model = tiny(seed).double()
    prompts = contexts()
    options = {"max_new_tokens": 6, "temperature": 1.5}
    seeds = [seed + i for i in range(4)]
    together = generate_text(model, prompts, seeds=seeds, **options)
    for prompt, own, row in zip(prompts, seeds, together, strict=True):
        (alone,) = generate_text(model, [prompt], seeds=[own], **options)
        assert torch.equal(alone, row), seed
    many = generate_text(model, [prompts[0]] * 16, seeds=range(16), **options)
    assert len({tuple(row.tolist()) for row in many}) > 1, seed


@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
def test_token_probabilities_are_the_definition(top_k, top_p, seed):
    torch.manual_seed(seed)
    logits, temperature = 3 * torch.randn(5, 20), random.Random(seed).uniform(0.3, 3)
    result = token_probabilities(logits, temperature, top_k, top_p)
    for row, actual in zip((logits.double() / temperature).softmax(-1), result, strict=True):
        order = row.argsort(descending=True).tolist()
        kept = order[:top_k]
        if top_p is not None:
            total = row[kept].sum()
            fewest = next((n for n in range(1, len(kept)) if row[kept[:n]].sum() >= top_p * total), len(kept))
            kept = kept[:fewest]
        expected = torch.zeros(20, dtype=torch.float64).index_copy(0, torch.tensor(kept), row[kept] / row[kept].sum())
        assert (actual > 0).sum() == len(kept), seed
        torch.testing.assert_close(actual, expected, msg=f"seed {seed}")


def chain(model, monkeypatch, successor):
    """Rigs the text side: the next token is `successor` of the row's last one, whatever came before."""
    seen = []

    def hidden(batch, patches, timestep, impl):
        seen.append((batch, patches, timestep))
        return batch.token_ids[..., None].float().expand(-1, -1, model.config.dim)

    def logits(states):
        following = torch.tensor([successor[int(token)] for token in states[:, 0]])
        return torch.nn.functional.one_hot(following, VOCABULARY).float()

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model.head, "forward", logits)
    return seen


def test_each_row_stops_by_itself(seed, monkeypatch):
    model = tiny(seed)
    seen = chain(model, monkeypatch, {10: 11, 11: 12, 12: EOS, 13: BOI, 14: 14, 15: EOS, EOI: 15})
    prompts = [
        (text(BOS, 10),),
        (text(BOS, 5, 6, 7, 13),),
        (text(BOS, 14),),
        (text(BOS), Image(torch.randn(SHAPE))),
    ]
    result = generate_text(model, prompts, max_new_tokens=5)
    assert [row.tolist() for row in result] == [[11, 12, EOS], [BOI], [14] * 5, [15, EOS]]
    assert [len(batch.token_ids) for batch, *_ in seen] == [4, 3, 2, 1, 1]
    assert all(row.dtype == torch.int64 for row in result)


# ---------------------------------------------------------------- both in turn


def rig_image(model, monkeypatch, value=0.25):
    """Rigs the image side: under v-prediction 0 the latents shrink, so all that counts is that they come through."""
    monkeypatch.setattr(
        model.codec, "decode", lambda states: torch.full((*states.shape[:2], model.config.patch_dim), value)
    )


def options_of(model, **changes):
    options = {
        "latent_shape": SHAPE,
        "max_new_tokens": 20,
        "max_images": 3,
        "scheduler": scheduler_of(model),
        "steps": 2,
        "seed": 0,
    }
    return options | changes


def shape_of(document):
    return [segment.token_ids.tolist() if isinstance(segment, Text) else "image" for segment in document]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_text_image_text(guidance_scale, seed, monkeypatch):
    model = tiny(seed)
    seen = chain(model, monkeypatch, {10: 11, 11: BOI, EOI: 12, 12: 13, 13: EOS})
    rig_image(model, monkeypatch)
    prompt = (text(BOS, 10),)
    document = generate(model, prompt, **options_of(model, guidance_scale=guidance_scale))
    assert shape_of(document) == [[BOS, 10, 11], "image", [12, 13, EOS]]
    assert shape_of(prompt) == [[BOS, 10]]
    # after the image: its clean latents, at timestep 0
    batch, patches, timestep = seen[-1]
    expected = rearrange(document[1].latent[None], "i c (y p) (x q) -> i (y x) (p q c)", p=PATCH, q=PATCH)
    assert torch.equal(patches, expected) and timestep.tolist() == [0]
    assert batch.token_ids[0].tolist() == [BOS, 10, 11, BOI, *[0] * 6, EOI, 12, 13]


def test_images_side_by_side_and_the_limit_of_images(seed, monkeypatch):
    model = tiny(seed)
    chain(model, monkeypatch, {BOS: BOI, EOI: BOI})
    rig_image(model, monkeypatch)
    document = generate(model, (text(BOS),), **options_of(model, max_images=2))
    assert shape_of(document) == [[BOS], "image", "image"]
    first, second = (segment.latent for segment in document[1:])
    assert not torch.equal(first, second)
    assert shape_of(generate(model, (text(BOS),), **options_of(model, max_images=0))) == [[BOS]]


def test_the_limit_of_tokens_holds_for_the_document(seed, monkeypatch):
    model = tiny(seed)
    chain(model, monkeypatch, {BOS: 10, 10: 11, 11: BOI, EOI: 12, 12: 12})
    rig_image(model, monkeypatch)

    def after(limit):
        return shape_of(generate(model, (text(BOS),), **options_of(model, max_new_tokens=limit)))

    assert after(2) == [[BOS, 10, 11]]
    assert after(3) == [[BOS, 10, 11], "image"]
    assert after(5) == [[BOS, 10, 11], "image", [12, 12]]


def test_the_loop_is_its_parts(seed):
    """On a network that is not rigged: a document of one text, with the draws of `generate_text`."""
    model = tiny(seed)
    with torch.no_grad():
        model.head.weight[BOI] = model.head.weight[EOS] = 0
        model.head.weight[5:] += 1
    document = generate(model, (text(BOS, 6),), **options_of(model, max_new_tokens=6))
    assert shape_of(document)[0][:2] == [BOS, 6]
    (greedy,) = generate_text(model, [(text(BOS, 6),)], max_new_tokens=6)
    generated = document[0].token_ids[2:]
    assert torch.equal(generated, greedy[greedy != BOI][: len(generated)])


# ---------------------------------------------------------------- what holds for all


def test_a_seed_determines_everything_and_nothing_else_does(seed):
    model = tiny(seed)
    before = torch.get_rng_state()

    def draw(seed):
        options = options_of(model, scheduler=scheduler_of(model, "ddpm"), steps=4, temperature=2.0, seed=seed)
        latents = denoise(
            model, contexts_, SHAPE, scheduler=options["scheduler"], steps=4, seeds=[seed + i for i in range(4)]
        )
        return latents, generate(model, contexts_[0], **options)

    contexts_ = [(text(BOS, 7),), (text(BOS, 8, 9),), (text(BOS),), (text(BOS, 10),)]
    first, again, other = draw(seed), draw(seed), draw(seed + 100)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert shape_of(first[1]) == shape_of(again[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(dtype, seed):
    model = tiny(seed).to(dtype)
    latents = denoise(
        model, contexts(), SHAPE, scheduler=scheduler_of(model), steps=2, seeds=range(4), guidance_scale=2.0
    )
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert len(generate_text(model, contexts(), max_new_tokens=2, temperature=1.0, seeds=range(4))) == 4


def test_modes_and_gradients_are_left_alone(seed):
    model = tiny(seed).train()
    model.codec.eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.transformer.register_forward_hook(
        lambda module, *_: during.append((module.training, torch.is_grad_enabled()))
    )
    latents = denoise(model, contexts()[:1], SHAPE, scheduler=scheduler_of(model), steps=2, seeds=[0])
    generate_text(model, contexts()[:1], max_new_tokens=1)
    assert during == [(False, False)] * 3
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and not latents.requires_grad and not latents.is_inference()


def test_nan_weights_are_named_and_the_process_goes_on(seed):
    model = tiny(seed).train()
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.codec.output.weight[0, 0] = torch.nan
        model.head.weight[3, 0] = torch.nan
    options = {"scheduler": scheduler_of(model), "steps": 2, "seeds": range(4)}
    with pytest.raises(FloatingPointError, match="denoising step 1 of 2"):
        denoise(model, contexts(), SHAPE, **options)
    with pytest.raises(FloatingPointError, match="new token 1 "):
        generate_text(model, contexts(), max_new_tokens=2)
    assert model.training and torch.is_grad_enabled()
    model.load_state_dict(good)
    assert denoise(model, contexts(), SHAPE, **options).isfinite().all()
    assert len(generate_text(model, contexts(), max_new_tokens=2)) == 4


GOOD = (Text(torch.tensor([BOS, 7])),)


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
    model = tiny(seed).train()
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": []}, "no contexts"),
        ({"contexts": [(Image(torch.zeros(SHAPE)),)]}, "must begin with a Text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"temperature": 1.0}, "temperature=1.0 needs one seed for each of 1 contexts, got no"),
        ({"temperature": 1.0, "seeds": [1, 2]}, "needs one seed for each of 1 contexts, got 2"),
    ],
)
def test_generate_text_refuses(change, message, seed):
    with pytest.raises(ValueError, match=message):
        generate_text(tiny(seed), **({"contexts": [GOOD], "max_new_tokens": 2} | change))


def test_generate_refuses(seed):
    model = tiny(seed)
    with pytest.raises(ValueError, match="max_images=-1"):
        generate(model, GOOD, **options_of(model, max_images=-1))
    with pytest.raises(ValueError, match="must begin with a Text"):
        generate(model, (), **options_of(model))
