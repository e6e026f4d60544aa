"""What a batch's way to a GPU waits for; no GPU is asked."""

import pytest
import torch
from torch import Tensor

from transfusion.kernels import IntervalMask, RaggedLatents
from transfusion.kernels.transfer import moved
from transfusion.sequence import Image, SpecialTokens, Text, collate


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every pin and copy, in their order; nothing is moved."""
    seen: list[str] = []

    def pin(tensor: Tensor) -> Tensor:
        seen.append("pin")
        return tensor

    def to(tensor: Tensor, device: str, non_blocking: bool = False) -> Tensor:
        seen.append("copy" if non_blocking else "wait")
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    return seen


def test_a_copy_that_is_not_to_block_goes_through_pinned_memory(steps: list[str]) -> None:
    for device, non_blocking, expected in (
        ("cuda", True, ["pin", "copy"]),
        ("cuda", False, ["wait"]),
        ("cpu", True, ["wait"]),  # from a GPU the host would read too early
    ):
        moved(torch.ones(1), device, non_blocking)
        assert steps == expected
        steps.clear()


@pytest.mark.parametrize("sides", [(4, 4), (4, 8)])
def test_all_of_a_batch_does(sides: tuple[int, int], request: pytest.FixtureRequest) -> None:
    documents = [(Text(torch.tensor([1, 7])), Image(torch.randn(3, 4, side))) for side in sides]
    batch = collate([documents], 40, 2, SpecialTokens(), torch.Generator())
    ragged = isinstance(batch.latents, RaggedLatents)
    assert ragged == (sides[0] != sides[1])
    steps = request.getfixturevalue("steps")
    batch.to("cuda")
    assert steps == ["pin", "copy"] * (12 if ragged else 10)


def test_a_mask_stays_what_it_is() -> None:
    mask = IntervalMask.causal(5)
    assert mask.to("cpu", non_blocking=True) is mask
