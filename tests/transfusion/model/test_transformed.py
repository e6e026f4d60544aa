"""The model under what torch does to any module: layers put in the place of others, forward-mode derivatives."""

import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from transfusion import Transfusion

BATCH = tiny.Batches(length=40).batch(0)


class Wrapped(nn.Module):
    """A layer that has no weight of its own, as a quantized one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def model(codec: str) -> Transfusion:
    made = Transfusion(replace(tiny.CONFIG, codec=codec))
    made.initialize(1)
    return made


@pytest.mark.parametrize("codec", ["linear", "unet"])
def test_layers_of_the_codec_may_be_others(codec: str) -> None:
    given = model(codec)
    before = given(BATCH).total
    for parent in list(given.codec.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Wrapped(child))
    assert torch.equal(given(BATCH).total, before)


@pytest.mark.parametrize("codec", ["linear", "unet"])
def test_quantizes_dynamically(codec: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao moves to another package
        quantized = torch.ao.quantization.quantize_dynamic(model(codec))
        total = quantized(BATCH).total
    assert type(quantized.codec.timestep.up).__module__.startswith("torch.ao.nn.quantized")
    assert total.isfinite()


@pytest.mark.parametrize("part", ["embedding.weight", "codec.timestep.up.weight", "head.weight", "qkv.weight"])
def test_a_forward_mode_derivative_is_refused(part: str) -> None:
    given = model("linear")
    weights = {name: weight.detach() for name, weight in given.named_parameters()}
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"has no forward-mode derivative.*use rev"):
        dual = {n: forward_ad.make_dual(w, torch.ones_like(w)) if part in n else w for n, w in weights.items()}
        functional_call(given, dual, (BATCH,))
