"""The formula of guidance, against itself and diffusers'."""

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from transfusion.generation import Guidance
from transfusion.kernels.testing import judge


def test_the_formula(seed):
    torch.manual_seed(seed)
    conditional, unconditional = torch.randn(2, 5, 3, 4, 4)
    assert torch.equal(Guidance(0.0)(conditional, unconditional), unconditional)
    guided = unconditional + 2.5 * (conditional - unconditional)
    assert torch.equal(Guidance(2.5)(conditional, unconditional), guided)
    assert torch.equal(Guidance(2.5, interval=(0.1, 0.2))(conditional, unconditional), guided)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(rescale, seed):
    torch.manual_seed(seed)
    conditional, unconditional = torch.randn(2, 50, 3, 4, 4)

    def theirs(conditional, unconditional):
        return rescale_noise_cfg(unconditional + 4.0 * (conditional - unconditional), conditional, rescale)

    ours = Guidance(4.0, rescale=rescale)(conditional, unconditional)
    gold = theirs(conditional.double(), unconditional.double())
    verdict = judge(ours, theirs(conditional, unconditional), gold)
    assert verdict.passed, (seed, verdict)
    if rescale == 1.0:
        torch.testing.assert_close(ours.flatten(1).std(1), conditional.flatten(1).std(1))


def test_rescaling_of_a_prediction_without_deviation_is_no_nan():
    flat = torch.ones(1, 3, 4, 4)
    assert torch.equal(Guidance(3.0, rescale=0.5)(flat, flat), flat)


def test_when_it_is_active():
    guidance = Guidance(2.0, interval=(0.25, 0.75))
    assert [guidance.active(time) for time in (0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0)] == [0, 0, 1, 1, 1, 0, 0]
    assert Guidance().off and not Guidance().active(0.5) and not guidance.off


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale=-1.0 must be a number >= 0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"interval": (0.5, 0.2)}, r"interval=\(0.5, 0.2\)"),
        ({"interval": (0.0, 1.5)}, r"interval=\(0.0, 1.5\)"),
        ({"interval": (0.0,)}, r"interval=\(0.0,\)"),
        ({"rescale": 1.5}, "rescale=1.5 must be within"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**change)
