"""First values: a function of seed, name and shape, on any device, in any order, built on meta or not."""

import math
from dataclasses import replace

import pytest
import tiny
import torch

from transfusion import Transfusion, presets
from transfusion.config import UNetConfig
from transfusion.model.initialization import initial_value

UNET = replace(tiny.CONFIG, codec="unet", unet=UNetConfig(width=16, deep_width=32, blocks=1, head_dim=16))


@pytest.mark.parametrize("config", [tiny.CONFIG, UNET], ids=["linear", "unet"])
def test_a_model_from_meta_is_the_model_built_at_once(config) -> None:
    with torch.device("meta"):
        late = Transfusion(config)
    late.to_empty(device="cpu")
    for parameter in late.parameters():
        parameter.data.fill_(torch.nan)
    late.initialize(seed=7)
    torch.manual_seed(123)
    now = Transfusion(config)
    now.initialize(seed=7)
    for (name, one), other in zip(late.state_dict().items(), now.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
        assert torch.equal(one, initial_value(name, one.shape, config, 7)), name
    assert not list(late.buffers())


def test_the_seed_is_torchs_where_none_is_given() -> None:
    one, same, other = tiny.model(seed=3), tiny.model(seed=3), tiny.model(seed=4)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, Transfusion(tiny.CONFIG).head.weight)


def test_initialisation_leaves_torchs_generator_alone_where_a_seed_is_given() -> None:
    model = tiny.model()
    before = torch.get_rng_state()
    model.initialize(seed=5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "shape", "deviation"),
    [
        ("head.weight", (3000, 64), 0.02),
        ("transformer.blocks.0.ffn.gate_up.weight", (3000, 64), 0.02),
        ("transformer.blocks.1.attention.out.weight", (3000, 64), 0.02 / math.sqrt(2 * 16)),
        ("transformer.blocks.1.ffn.down.weight", (3000, 64), 0.02 / math.sqrt(2 * 16)),
    ],
)
def test_deviations(name: str, shape: tuple[int, int], deviation: float) -> None:
    value = initial_value(name, torch.Size(shape), presets.get("0.16b"), 0)
    # the sample deviation of n normals has a relative deviation of 1/√(2n): six of them
    assert abs(value.std() / deviation - 1) < 6 / math.sqrt(2 * value.numel())
    assert abs(value.mean()) < 6 * deviation / math.sqrt(value.numel())


def test_the_text_loss_starts_at_that_of_guessing() -> None:
    model = tiny.model()
    losses = model(tiny.Batches().batch(0))
    assert abs(losses.text - math.log(tiny.CONFIG.vocab_size)) < 0.1


def test_weights_of_one_shape_differ_from_layer_to_layer() -> None:
    first, second = (block.attention.qkv.weight for block in tiny.model().transformer.blocks)
    assert not torch.equal(first, second)
