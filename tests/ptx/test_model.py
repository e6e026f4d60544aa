"""A training step and a generation of a whole model, with every kernel as it ships for sm_90."""

import copy
import dataclasses
import random

import torch
from tiny import CONFIG, document
from torch import Tensor

from transfusion import Transfusion
from transfusion.diffusion.sampler import make_scheduler
from transfusion.generation.interleaved import generate
from transfusion.generation.requests import Request
from transfusion.kernels.testing import judge
from transfusion.sequence import Batch, SpecialTokens, Text, collate

WIDER = dataclasses.replace(CONFIG, dim=64)  # heads of 32


def results(model: Transfusion, batch: Batch, impl: str) -> list[Tensor]:
    """What text is told from, the loss of each image, and every gradient.

    A mean loss is one number, whose error may be none by luck.
    """
    model.zero_grad()
    hidden: list[Tensor] = []
    with model.transformer.register_forward_hook(lambda _, given, result: hidden.append(result.detach())):
        losses = model(batch, impl)
    losses.total.backward()
    of_text = hidden[0].flatten(0, 1)[batch.text_rows]
    return [of_text, losses.per_image.detach(), *(weight.grad for weight in model.parameters())]


def test_training_step_in_bfloat16(device: None, seed: int) -> None:
    """Losses and gradients err from float64 no more than twice as far as those of the references do."""
    rng = random.Random(seed)
    rows = [[document(rng) for _ in range(9)] for _ in range(4)]
    batch = collate(rows, 200, WIDER.patch_size, SpecialTokens(), torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model = Transfusion(WIDER).bfloat16()
    gold = results(copy.deepcopy(model).double(), batch, "reference")
    found, eager = results(model, batch, "triton"), results(copy.deepcopy(model), batch, "reference")
    for name, *each in zip(["of_text", "per_image", *dict(model.named_parameters())], found, eager, gold, strict=True):
        verdict = judge(*each)
        assert verdict.passed, (name, verdict)


def test_generation(device: None, seed: int) -> None:
    """Text and an image after prompts of unequal length: the tokens and the latents of other kernels, in float32."""
    torch.manual_seed(seed)
    model = Transfusion(WIDER)
    rng = random.Random(seed)
    contexts = [(Text(torch.tensor([1, *(rng.randrange(5, 40) for _ in range(length))])),) for length in (3, 60)]
    requests = [Request(contexts[0], max_new_tokens=5), Request(contexts[1], max_images=1, image_next=True, seed=seed)]
    scheduler = make_scheduler(WIDER.schedule)
    found, expected = (
        generate(model, requests, latent_shape=(3, 8, 8), scheduler=scheduler, steps=4, impl=impl)
        for impl in ("triton", "auto")
    )
    assert torch.equal(found[0].token_ids, expected[0].token_ids) and len(found[0].token_ids)
    latents = [generation.new[-1].latent for generation in (found[1], expected[1])]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
