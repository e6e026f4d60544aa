"""Strings and pictures in and out."""

import pytest
import rigged
import torch

from transfusion.data import PixelAutoencoder, Tokenizer
from transfusion.generation import TransfusionPipeline

PROMPTS = ["a", "red"]


@pytest.fixture
def pipeline():
    model = rigged.random_model(seed=3)
    tokenizer = Tokenizer.train(["red green"], 300)
    tokenizer.encode = lambda text: torch.tensor([5 + ord(letter) % 15 for letter in text], dtype=torch.int64)
    return TransfusionPipeline(model, tokenizer, PixelAutoencoder(), rigged.SHAPE)


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline):
    options = {"steps": 5, "guidance_scale": 2.0}
    both = pipeline.images(PROMPTS, seed=7, **options)
    assert both.shape == (2, *rigged.SHAPE)
    assert both.abs().max() <= 1
    torch.testing.assert_close(pipeline.images(PROMPTS[1:], seed=8, **options), both[1:], atol=1e-4, rtol=1e-4)
    assert not torch.equal(pipeline.images(PROMPTS[:1], seed=8, **options), both[:1])


def test_schedulers_by_name_and_as_objects(pipeline):
    from diffusers import DDIMScheduler

    own = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )
    by_object = pipeline.images(PROMPTS, steps=5, scheduler=own)
    assert torch.equal(by_object, pipeline.images(PROMPTS, steps=5, scheduler="ddim"))
    assert torch.equal(by_object, pipeline.images(PROMPTS, steps=5))
    assert not torch.equal(by_object, pipeline.images(PROMPTS, steps=5, scheduler="dpmsolver"))
    with pytest.raises(ValueError, match="'euler' cannot sample 'v_prediction'"):
        pipeline.images(PROMPTS, scheduler="euler")


def test_captions_and_continuations_are_one_text_each(pipeline):
    captions = pipeline.captions(torch.rand(3, *rigged.SHAPE) * 2 - 1, max_new_tokens=4)
    assert len(captions) == 3
    assert all(isinstance(caption, str) for caption in captions)
    texts = pipeline.continuations(["ab", ""], max_new_tokens=4, temperature=1.0, seed=2)
    assert texts == pipeline.continuations(["ab", ""], max_new_tokens=4, temperature=1.0, seed=2)
