"""Positions along a document and on an image's grid, rotary frequencies, and the rotation with its gradient."""

import math
from dataclasses import replace

import pytest
import tiny
import torch

from transfusion.config import RopeScaling
from transfusion.kernels.testing import judge
from transfusion.model.positions import frequencies, grid_positions, on_grid, one_image_on_grid, rotary, rotate
from transfusion.sequence import Batch, Image, SpecialTokens, Text, collate

GRID = replace(tiny.CONFIG, image_positions="grid")
TAIL = torch.tensor([9, 2])


def two_images(sides: list[tuple[int, int]]) -> Batch:
    """A document with images of these sides, then one of two tokens, then padding."""
    images = (Image(torch.randn(3, *size)) for size in sides)
    documents = [(Text(torch.tensor([1, 7])), *images), (Text(TAIL),)]
    return collate([documents], 40, 2, SpecialTokens(), torch.Generator())


def expected_places(sides: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(row, column) place of each token of `two_images`, counted by hand."""
    places = [(0, 0), (1, 1)]
    for height, width in sides:
        places.append((len(places), len(places)))  # BOI
        start = len(places)
        places += [(start + y, start + x) for y in range(height // 2) for x in range(width // 2)]
        places.append((len(places), len(places)))  # EOI
    places += [(0, 0), (1, 1)]
    return places + [(0, 0)] * (40 - len(places))


@pytest.mark.parametrize("sides", [[(4, 6), (4, 6)], [(4, 6), (8, 4)]], ids=["dense", "ragged"])
def test_grid_positions_are_row_and_column(sides: list[tuple[int, int]]) -> None:
    batch = two_images(sides)
    assert on_grid(batch, 2)[0].tolist() == [list(place) for place in expected_places(sides)]


def test_grid_positions_of_a_window_are_those_of_the_batch() -> None:
    batch = two_images([(4, 6), (4, 6)])
    whole = on_grid(batch, 2)
    first = int(batch.image_rows[0])
    window = one_image_on_grid(batch.positions[:, first : first + 7], 6, 3)
    assert torch.equal(window, whole[:, first : first + 7])
    index = torch.arange(6)
    assert grid_positions(10 + index, index, 3).tolist() == [[10, 10], [10, 11], [10, 12], [11, 10], [11, 11], [11, 12]]


def test_text_is_turned_on_the_grid_as_without_it() -> None:
    positions = torch.randint(1000, (2, 9))
    for one, other in zip(rotary(positions, GRID), rotary(positions[..., None].expand(2, 9, 2), GRID), strict=True):
        assert torch.equal(one, other)


def test_on_a_grid_scores_depend_on_the_distance_in_rows_and_columns() -> None:
    """q·k of two tokens is the same wherever the image stands, and differs for another direction."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(first: tuple[int, int], second: tuple[int, int]) -> float:
        turned = [rotate(x.float(), *rotary(torch.tensor([[place]]), GRID)) for x, place in ((q, first), (k, second))]
        return float((turned[0] * turned[1]).sum())

    base = score((5, 7), (8, 9))
    assert math.isclose(base, score((105, 47), (108, 49)), rel_tol=0, abs_tol=1e-4 * float(q.norm() * k.norm()))
    assert abs(base - score((5, 7), (7, 10))) > 1e-3


def test_the_model_reads_the_grid() -> None:
    """An image with another shape of the same number of tokens gives other hidden states on the grid alone."""
    patches, timestep = torch.randn(1, 4, 12), torch.tensor([10])
    for config, differs in ((tiny.CONFIG, False), (GRID, True)):
        model = tiny.model(config)
        hidden = []
        for sides in ((4, 4), (2, 8)):
            document = (Text(torch.tensor([1, 7])), Image(torch.zeros(3, *sides)), Text(TAIL))
            batch = collate([[document]], 10, 2, SpecialTokens(), torch.Generator())
            hidden.append(model.hidden(batch, patches, timestep))
        assert torch.equal(*hidden) != differs


def test_llama_3_slows_low_frequencies_alone() -> None:
    config = replace(tiny.CONFIG, rope_theta=1000.0)
    plain = frequencies(config, torch.device("cpu"))
    scaled = frequencies(replace(config, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)), torch.device("cpu"))
    turns = 64 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns >= 4], plain[turns >= 4]) and (turns >= 4).any()
    assert torch.equal(scaled[turns <= 1], plain[turns <= 1] / 8) and (turns <= 1).any()
    between = (turns > 1) & (turns < 4)
    assert between.any() and (scaled < plain)[between].all() and (scaled > plain / 8)[between].all()


def test_a_rotation_of_bfloat16_is_rounded_once() -> None:
    """Computed in float32: as close to float64 as the rounding of the result lets them be; compiled too."""
    x = torch.randn(2, 5, 4, 16).bfloat16()
    positions = torch.randint(100, (2, 5))
    cos, sin = rotary(positions, tiny.CONFIG)
    gold = rotate_exactly(x.double(), cos.double(), sin.double())
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    for turned in (rotate(x, cos, sin), compiled(x, cos, sin)):
        verdict = judge(turned, gold.bfloat16(), gold, factor=1.0)
        assert verdict.passed and turned.dtype == x.dtype, verdict


def test_a_gradient_is_turned_back() -> None:
    """Of views, as the projection's heads are, of 16 bits, compiled, and twice."""
    heads = torch.randn(2, 5, 6, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary(torch.randint(100, (2, 5)), tiny.CONFIG)

    def turned(heads: torch.Tensor) -> torch.Tensor:
        return rotate(heads[:, :, :4], cos, sin)

    assert torch.autograd.gradcheck(turned, heads)
    assert torch.autograd.gradgradcheck(turned, heads)
    half, grad = heads.detach().bfloat16().requires_grad_(), torch.randn(2, 5, 4, 16).bfloat16()
    gold = rotate_exactly(grad.double(), cos.double(), -sin.double())
    for each in (turned, torch.compile(turned, backend="aot_eager", fullgraph=True)):
        (found,) = torch.autograd.grad(each(half), half, grad)
        verdict = judge(found[:, :, :4], gold.bfloat16(), gold, factor=1.0)
        assert verdict.passed and not found[:, :, 4:].any(), verdict


def test_a_rotation_under_torch_func() -> None:
    x, grad = torch.randn(2, 2, 5, 4, 16, dtype=torch.float64)
    cos, sin = rotary(torch.randint(100, (2, 5)), tiny.CONFIG)
    turned, pullback = torch.func.vjp(lambda x: rotate(x, cos, sin), x)
    gold = rotate_exactly(x, cos.double(), sin.double()), rotate_exactly(grad, cos.double(), -sin.double())
    for found, expected, eager in zip((turned, pullback(grad)[0]), gold, (x, grad), strict=True):
        sign = sin if eager is x else -sin
        verdict = judge(found, rotate(eager, cos, sign), expected)
        assert verdict.passed, verdict


def rotate_exactly(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)
