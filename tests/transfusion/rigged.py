"""Small random networks, rigged ones, and documents to go on from: what the generation tests share."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from transfusion.config import ModelConfig
from transfusion.data.packing import seeded
from transfusion.diffusion.sampler import make_scheduler
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.generation import Request
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


def random_model(seed, prediction="v_prediction", std=0.3, **changes):
    """A model whose random weights are large enough for every token to matter to every later one.

    std: 0.3 makes attention so sharp that one rounding may grow a hundredfold; 0.1 keeps roundings alike.
    """
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
    config = replace(config, **changes)
    model = Transfusion(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
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


def scheduler_of(model, name="fast"):
    return make_scheduler(model.config.schedule, name)


def rows_by_hand(model, document, impl="auto"):
    """One document as a batch of one row, its tokens in patches, and its network evaluated: nothing of ours between."""
    batch = collate([[document]], document_length(document, PATCH), PATCH, SPECIAL, torch.Generator())

    def hidden(latents, timestep):
        window = model.config.codec_window
        patches = rearrange(latents, "i c (y p) (x q) -> i (y x) (p q c)", p=window, q=window)
        return model.hidden(replace(batch, latents=latents), patches, timestep, impl)

    return batch, hidden


def image_noise(seed, number=0):
    """What image `number` of the row with this seed starts from, and the generator that its scheduler goes on with."""
    generator = seeded(seed, "image", number)
    return torch.randn(SHAPE, generator=generator), generator


def plain_prediction(model, document):
    """(latents (1, C, h, w), t) -> the prediction of the document's last image, its other images clean."""
    batch, hidden = rows_by_hand(model, document)
    count, schedule = batch.num_images, model.config.schedule

    def predict(latents, t):
        timestep = torch.zeros(count, dtype=torch.int64 if schedule.path == "cosine" else torch.float32)
        timestep[-1] = t
        everything = torch.cat([batch.latents[:-1], latents])
        states = hidden(everything.to(model.head.weight.dtype), timestep).flatten(0, 1)
        decoded = model.codec.decode(states[batch.image_rows.view(count, -1)[-1:]]).float()
        return rearrange(decoded, "i (y x) (p q c) -> i c (y p) (x q)", p=PATCH, q=PATCH, y=SHAPE[1] // PATCH)

    return predict


def plain_denoise(model, context, seed, scheduler, steps=4, number=0, scale=1.0):
    """The image after `context`: the whole sequence anew at every step, and diffusers' loop written plainly."""
    noise, generator = image_noise(seed, number)
    schedule, latents = model.config.schedule, noise[None]
    conditional, unconditional = (plain_prediction(model, (*b, Image(noise))) for b in (context, (text(BOS),)))
    unit = 1.0
    if schedule.path == "flow":
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    elif schedule.path == "trigflow":
        scheduler.set_timesteps(steps, intermediate_timesteps=None)
        unit = schedule.sigma_data
    else:
        scheduler.set_timesteps(steps)
    latents = latents * unit
    for t in scheduler.timesteps[:steps]:
        predicted = conditional(latents, t)
        if scale != 1:
            without = unconditional(latents, t)
            predicted = without + scale * (predicted - without)
        latents = scheduler.step(unit * predicted, t, latents, generator=[generator]).prev_sample
    return latents[0]


def plain_text(model, context, limit, stop=(EOS, BOI)):
    """Greedy: the whole sequence anew for every token -> tokens and their log-probabilities."""
    tokens, logprobs = [], []
    while len(tokens) < limit and not (tokens and tokens[-1] in stop):
        batch, hidden = rows_by_hand(model, (*context, text(*tokens)))
        timestep = torch.zeros(batch.num_images, dtype=torch.int64)
        latents = batch.latents.to(model.head.weight.dtype)
        log_p = model.head(hidden(latents, timestep)[0, -1]).log_softmax(-1)
        tokens.append(int(log_p.argmax()))
        logprobs.append(log_p.max().item())
    return tokens, logprobs


def chain(model, monkeypatch, successor):
    """Rigs the text side: the next token is `successor` of the row's last one, whatever came before. -> what the
    transformer was called with: (x, positions) of each call; x is the token's id, or -1 - the timestep for an image."""
    seen, dim = [], model.config.dim

    def transformer(x, positions, mask, impl, cache=None):
        seen.append((x[..., 0], positions))
        return x

    def logits(states):
        following = torch.tensor([successor.get(int(token), EOS) for token in states[:, 0]])
        return torch.nn.functional.one_hot(following, VOCABULARY).float()

    monkeypatch.setattr(model.embedding, "forward", lambda ids: ids[..., None].float().expand(*ids.shape, dim))
    monkeypatch.setattr(
        model.codec, "encode", lambda patches, t, *_: (-1 - t.float())[:, None, None].expand(*patches.shape[:2], dim)
    )
    monkeypatch.setattr(model.transformer, "forward", transformer)
    monkeypatch.setattr(model.head, "forward", logits)
    return seen


def rig_image(model, monkeypatch, value=0.25):
    """Rigs the image side: the same prediction everywhere and always, so that an image is a function of its noise."""
    monkeypatch.setattr(
        model.codec, "decode", lambda states: torch.full((*states.shape[:2], model.config.patch_dim), value)
    )


def in_several_orders(result, count=12):
    """`result()`, and `count` times more with the sums of every linear layer in another order: where one number errs
    most in all of them, a few may all be right by luck."""
    linear = torch.nn.functional.linear

    def reordered(x, weight, bias=None):
        order = torch.randperm(weight.shape[1])
        return linear(x[..., order], weight[:, order], bias)

    results = [result()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", reordered)
        return results + [result() for _ in range(count)]


def write(*context, tokens=8, images=0, seed=0):
    """A request for text, and for images in it."""
    return Request(context, max_new_tokens=tokens, max_images=images, seed=seed)


def paint(*context, tokens=0, images=1, seed=0, known=None):
    """A request that begins with an image."""
    return Request(context, max_new_tokens=tokens, max_images=images, image_next=True, seed=seed, known=known)


def options_of(model, **changes):
    """What `generate` takes beside the requests."""
    return {"latent_shape": SHAPE, "scheduler": scheduler_of(model), "steps": 2} | changes


def shape_of(document):
    return [segment.token_ids.tolist() if isinstance(segment, Text) else "image" for segment in document]


GOOD = (Text(torch.tensor([BOS, 7])),)
