"""The models of the benchmarks: what they are made of."""

import torch

from benchmarks.models import random_model
from transfusion import Transfusion, presets


def test_a_random_model_is_whole_and_the_same_at_every_call():
    first, second = (random_model(presets.get("tiny")) for _ in range(2))
    usual = dict(Transfusion(presets.get("tiny")).named_parameters())
    for (name, weight), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other) and weight.requires_grad, name
        if weight.ndim < 2:
            assert torch.equal(weight.detach().cpu(), usual[name]), name
        else:
            assert 0 < weight.std() < 2 * 0.02, name
