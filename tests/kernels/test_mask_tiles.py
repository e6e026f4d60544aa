"""Tiles of a mask: exact where it matters, useful where it pays, and the same from the kernel as from the reference."""

import random

import pytest
import torch
from torch import Tensor

from transfusion.kernels import IntervalMask
from transfusion.kernels.mask_tiles import check, kernel, reference
from transfusion.kernels.mask_tiles.reference import EMPTY, FULL, HEADER, MASKED, RUNS, WIDTH
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import LAYOUTS, random_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = 4  # as on a device


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FEW", FEW)
    if TRITON_INTERPRET:  # a device has compiled it in
        monkeypatch.setattr(kernel, "_FEW", FEW)


def masks() -> list[IntervalMask]:
    """The layouts that broke others, random rows, random intervals, stripes of more runs than a row has room for."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    made = [layout.mask() for layout in LAYOUTS.values()]
    made += [IntervalMask.stack([random_layout(rng, 150).mask() for _ in range(2)]) for _ in range(4)]
    for queries, keys in ((1, 65), (40, 7), (23, 400)):
        start, end = torch.randint(-3, queries + 3, (2, 2, keys), generator=generator)
        made.append(IntervalMask(start, end, queries))
    for unseen in (0, 11):  # stripes of full tiles between empty and between masked ones
        stripe = torch.arange(900)[None] // 16 % 2
        made.append(IntervalMask(torch.zeros_like(stripe), torch.where(stripe == 0, 40, unseen), 40))
    return made


def decoded(line: list[int], tiles: int) -> list[int]:
    """The kind of each of `tiles` tiles, from one row of the result. No tile may be in two runs."""
    kinds = [EMPTY] * tiles
    for kind, count, places in ((MASKED, line[0], line[HEADER:]), (FULL, line[1], line[HEADER + 2 * RUNS :])):
        for first, last in zip(places[: 2 * count : 2], places[1 : 2 * count : 2], strict=True):
            assert first < last <= tiles
            assert kinds[first:last] == [EMPTY] * (last - first)
            kinds[first:last] = [kind] * (last - first)
    assert line[2:4] == [sum(kind != EMPTY for kind in kinds), kinds.count(MASKED)]
    return kinds


def check_lines(lines: Tensor, dense: Tensor, block: int, other: int) -> None:
    """Every visible pair lies in a tile of some run; every full tile is full."""
    assert lines.shape == (-(-dense.shape[0] // block) * WIDTH,)
    for row, line in enumerate(lines.view(-1, WIDTH).tolist()):
        strip = dense[row * block : (row + 1) * block]
        for tile, kind in enumerate(decoded(line, -(-dense.shape[1] // other))):
            pairs = strip[:, tile * other : (tile + 1) * other]
            assert pairs.shape[1] == other or kind != FULL or dense.shape[1] % other == 0 or pairs.all()
            assert pairs.all() if kind == FULL else kind == MASKED or not pairs.any()


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 16), (16, 64), (8, 4)])
def test_runs_hold_the_dense_mask(block_q: int, block_k: int) -> None:
    for mask in masks():
        for row, dense in enumerate(mask.to_dense()):
            check_lines(mask.query_tiles(block_q, block_k)[row], dense, block_q, block_k)
            check_lines(mask.key_tiles(block_k, block_q)[row], dense.T, block_k, block_q)


def test_runs_are_not_merely_safe() -> None:
    """Of a causal row and of an image the inner tiles are full; what a hidden image leaves is empty."""
    causal = IntervalMask.causal(128).query_tiles(16, 16).view(-1, WIDTH).tolist()
    first = [[FULL if t > FEW else MASKED] * t for t in range(8)]  # a few full tiles are masked with the others
    assert [decoded(line, 8) for line in causal] == [first[t] + [MASKED] + [EMPTY] * (7 - t) for t in range(8)]
    image = IntervalMask.from_spans(128, [(32, 96)]).query_tiles(16, 16).view(-1, WIDTH).tolist()
    assert decoded(image[2], 8) == [FULL] * 6 + [EMPTY] * 2
    cut = IntervalMask.full(120, 40).key_tiles(16, 16).view(-1, WIDTH).tolist()  # the last query tile is not whole
    assert [decoded(line, 8) for line in cut] == [[FULL] * 7 + [MASKED]] * 2 + [[MASKED] * 8]
    hidden = IntervalMask.from_spans(128, [(32, 96)], hidden_images=[0]).query_tiles(16, 16).view(-1, WIDTH).tolist()
    assert decoded(hidden[7], 8) == [MASKED] * 2 + [EMPTY] * 4 + [MASKED] * 2
    hidden = IntervalMask.from_spans(256, [(96, 160)], hidden_images=[0]).query_tiles(16, 16).view(-1, WIDTH).tolist()
    assert decoded(hidden[15], 16) == [FULL] * 6 + [EMPTY] * 4 + [FULL] * 5 + [MASKED]


def test_what_finds_no_place_is_one_masked_run() -> None:
    stripe = torch.arange(1000)[None] // 16 % 2
    mask = IntervalMask(torch.zeros_like(stripe), torch.where(stripe == 0, 16, 0), 16)
    (line,) = mask.query_tiles(16, 16).view(-1, WIDTH).tolist()
    assert line[:4] == [1, RUNS, RUNS + 63 - 2 * RUNS, 63 - 2 * RUNS]
    assert line[HEADER : HEADER + 2] == [2 * RUNS, 63]


@pytest.mark.parametrize("blocks", [(32, 16), (16, 64)])
def test_kernel_equals_reference(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK", 16)  # so that lines of a few hundred keys take several
    for mask in [*random.sample(masks()[: len(LAYOUTS)], 3), *masks()[-6:]]:
        found = check.verdicts(mask.to(DEVICE), *blocks)
        assert len(found) == 2 and all(verdict.passed for verdict in found.values()), (found, mask)


def test_a_wrong_list_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, right = LAYOUTS["adjacent_images"].mask().to(DEVICE), kernel.key_tiles
    monkeypatch.setattr(kernel, "key_tiles", lambda *call: right(*call) + 1)
    found = check.verdicts(mask, 32, 16)
    assert found["query_tiles"].passed and not found["key_tiles"].passed


def test_opcheck() -> None:
    mask = LAYOUTS["hidden_image"].mask(DEVICE)
    for each in (torch.ops.transfusion.query_tiles.default, torch.ops.transfusion.key_tiles.default):
        arguments = (mask.intervals, mask.num_queries, 32, 16)
        # what a place without a run holds is not defined, so results of two calls need not agree there
        torch.library.opcheck(each, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph_reads_new_masks() -> None:
    """Captured once, replayed on other vectors: nothing waits for the host."""
    static = IntervalMask.causal(512, DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kernel.query_tiles(static.intervals, 512, 64, 64)
    with torch.cuda.graph(graph):
        lines = kernel.query_tiles(static.intervals, 512, 64, 64)
    other = IntervalMask.from_spans(512, [(10, 300)], device=DEVICE)
    static.intervals.copy_(other.intervals)
    graph.replay()
    check_lines(lines[0].cpu(), other.to_dense()[0].cpu(), 64, 64)
