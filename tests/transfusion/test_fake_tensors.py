"""Under torch's FakeTensorMode, where memory is estimated: what shapes decide works, what numbers decide says so."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from transfusion import Transfusion
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.diffusion.steps import ddim_step
from transfusion.sequence import Batch, Image, SpecialTokens, Text, collate

WORDS = torch.tensor([1, 7, 8, 9])


def made(words: torch.Tensor, *heights: int) -> Batch:
    images = [Image(torch.randn(3, height, 4)) for height in heights]
    return collate([[(Text(words), *images)]], 40, 2, SpecialTokens(), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("early", [False, True], ids=["fake batch", "real batch"])
@pytest.mark.parametrize("codec", ["linear", "linear ragged", "unet"])
def test_a_step(codec: str, early: bool) -> None:
    heights = (4, 8) if "ragged" in codec else (8, 8)
    real = made(WORDS, *heights)
    with FakeTensorMode(allow_non_fake_inputs=early):
        model = Transfusion(replace(tiny.CONFIG, codec=codec.split()[0]))
        losses = model(real if early else made(WORDS, *heights))
        losses.total.backward()
    assert isinstance(losses.total, FakeTensor) and losses.per_image.shape == (2,)
    assert all(isinstance(p.grad, FakeTensor) and p.grad.shape == p.shape for p in model.parameters())


def test_words_without_numbers_are_named() -> None:
    told = pytest.raises(ValueError, match=r"token_ids=.* no numbers to pack: make them, .* before")
    with told:
        made(WORDS.to("meta"), 4)
    with FakeTensorMode(), told:
        made(torch.tensor([1, 7, 8, 9]), 4)


def test_a_samplers_step_has_its_numbers() -> None:
    wanted = ddim_step(NoiseSchedule(), 500, 400)
    with FakeTensorMode():
        assert ddim_step(NoiseSchedule(), 500, 400) == wanted
