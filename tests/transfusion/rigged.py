"""Small random networks, rigged ones, and documents to go on from: what the generation tests share."""

from dataclasses import replace

import torch
from einops import rearrange

from transfusion.config import ModelConfig
from transfusion.diffusion.sampler import make_scheduler
from transfusion.diffusion.schedule import NoiseSchedule
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


def random_model(seed, prediction="v_prediction"):
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


def rig_image(model, monkeypatch, value=0.25):
    """Rigs the image side: the same prediction everywhere and always, so that an image is a function of its noise."""
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


GOOD = (Text(torch.tensor([BOS, 7])),)
