"""What holds for images and text alike: seeds, precision, modes, NaN."""

import pytest
import torch
from rigged import BOS, SHAPE, contexts, options_of, random_model, scheduler_of, shape_of, text

from transfusion.generation import denoise, generate, generate_text


def test_a_seed_determines_everything_and_nothing_else_does(seed):
    model = random_model(seed)
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
    model = random_model(seed).to(dtype)
    latents = denoise(
        model, contexts(), SHAPE, scheduler=scheduler_of(model), steps=2, seeds=range(4), guidance_scale=2.0
    )
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert len(generate_text(model, contexts(), max_new_tokens=2, temperature=1.0, seeds=range(4))) == 4


def test_modes_and_gradients_are_left_alone(seed):
    model = random_model(seed).train()
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
    model = random_model(seed).train()
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
