"""What holds for images and text alike: seeds, precision, modes, NaN."""

import pytest
import torch
from rigged import (
    BOS,
    SHAPE,
    contexts,
    in_several_orders,
    options_of,
    paint,
    random_model,
    scheduler_of,
    shape_of,
    text,
    write,
)

from transfusion.generation import Guidance, TextSampling, denoise, generate, graphs
from transfusion.kernels.testing import judge


def test_a_seed_determines_everything_and_nothing_else_does(seed):
    model = random_model(seed).double()
    before = torch.get_rng_state()
    prompts = [(text(BOS, 7),), (text(BOS, 8, 9),), (text(BOS),), (text(BOS, 10),)]
    options = options_of(model, scheduler=scheduler_of(model, "ddpm"), steps=4, sampling=TextSampling(2.0))

    def draw(seed, rows=range(4)):
        return generate(model, [paint(*prompts[i], tokens=6, images=2, seed=seed + i) for i in rows], **options)

    first, again, other, part = draw(seed), draw(seed), draw(seed + 100), draw(seed, [3, 1])
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and shape_of(a.new) == shape_of(b.new)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        assert not torch.equal(a.images[0], c.images[0])
    for whole, alone in zip([first[3], first[1]], part, strict=True):  # whatever the batch, and its order
        assert whole.token_ids.tolist() == alone.token_ids.tolist(), seed
        torch.testing.assert_close(whole.images, alone.images)
    assert len({tuple(each.token_ids.tolist()) for each in (*first, *other)}) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(dtype, seed):
    model = random_model(seed).to(dtype)
    options = {"scheduler": scheduler_of(model), "steps": 2, "guidance": Guidance(2.0)}
    latents = denoise(model, contexts(), SHAPE, seeds=range(4), **options)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    requests = [write(*context, tokens=2) for context in contexts()]
    assert len(generate(model, requests, **options_of(model, sampling=TextSampling(1.0)))) == 4


def test_modes_and_gradients_are_left_alone(seed):
    model = random_model(seed).train()
    model.codec.eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.transformer.register_forward_hook(
        lambda module, *_: during.append((module.training, torch.is_grad_enabled()))
    )
    (result,) = generate(model, [paint(text(BOS, 7), tokens=1)], **options_of(model))
    assert set(during) == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and not result.images[0].requires_grad and not result.images[0].is_inference()


def test_nan_weights_are_named_and_the_process_goes_on(seed):
    model, prompts = random_model(seed).train(), contexts()
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = denoise(model, prompts, SHAPE, scheduler=scheduler_of(model), steps=2, seeds=range(4))
    with torch.no_grad():
        model.codec.output.weight[0, 0] = torch.nan
        model.head.weight[3, 0] = torch.nan
    options = {"scheduler": scheduler_of(model), "steps": 2, "seeds": range(4)}
    with pytest.raises(FloatingPointError, match="denoising step 1 of 2"):
        denoise(model, prompts, SHAPE, **options)
    with pytest.raises(FloatingPointError, match="logits of a new token are not finite; look for NaN in the weights"):
        generate(model, [write(*context) for context in prompts], **options_of(model))
    assert model.training and torch.is_grad_enabled()
    model.load_state_dict(good)
    assert torch.equal(denoise(model, prompts, SHAPE, **options), before)
    assert len(generate(model, [write(*context) for context in prompts], **options_of(model))) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_graphs_give_what_the_cpu_gives(dtype, seed, monkeypatch):
    """Guidance, its interval, text, several images, rows that finish: every path through a captured step.

    One order of summation may be right by luck, so the CPU's is judged in several.
    """
    monkeypatch.setattr(graphs, "EAGER", 1)
    model = random_model(seed, std=0.15, dim=64, heads=2)
    options = options_of(model, steps=4, guidance=Guidance(2.0, interval=(0.2, 0.8)))
    requests = [paint(*context, tokens=5, seed=seed + i) for i, context in enumerate(contexts())]

    def images(model, kind=torch.float32):
        return torch.stack([each.images[0] for each in generate(model, requests, **options)]).to(kind)

    gold = images(model.double(), torch.float64)
    model.to(dtype)
    eager = in_several_orders(lambda: images(model))
    verdict = judge(images(model.cuda()), eager, gold)
    assert verdict.passed, (seed, verdict)
