"""`generate` on networks rigged to emit a known document."""

import pytest
import torch
from einops import rearrange
from rigged import BOI, BOS, EOI, EOS, GOOD, PATCH, chain, options_of, random_model, rig_image, shape_of, text

from transfusion.generation import generate


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_text_image_text(guidance_scale, seed, monkeypatch):
    model = random_model(seed)
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
    model = random_model(seed)
    chain(model, monkeypatch, {BOS: BOI, EOI: BOI})
    rig_image(model, monkeypatch)
    document = generate(model, (text(BOS),), **options_of(model, max_images=2))
    assert shape_of(document) == [[BOS], "image", "image"]
    first, second = (segment.latent for segment in document[1:])
    assert not torch.equal(first, second)
    assert shape_of(generate(model, (text(BOS),), **options_of(model, max_images=0))) == [[BOS]]


def test_the_limit_of_tokens_holds_for_the_document(seed, monkeypatch):
    model = random_model(seed)
    chain(model, monkeypatch, {BOS: 10, 10: 11, 11: BOI, EOI: 12, 12: 12})
    rig_image(model, monkeypatch)

    def after(limit):
        return shape_of(generate(model, (text(BOS),), **options_of(model, max_new_tokens=limit)))

    assert after(2) == [[BOS, 10, 11]]
    assert after(3) == [[BOS, 10, 11], "image"]
    assert after(5) == [[BOS, 10, 11], "image", [12, 12]]


def test_generate_refuses(seed):
    model = random_model(seed)
    with pytest.raises(ValueError, match="max_images=-1"):
        generate(model, GOOD, **options_of(model, max_images=-1))
    with pytest.raises(ValueError, match="must begin with a Text"):
        generate(model, (), **options_of(model))
