"""The runs of tiles as kernels for sm_90 make them: those of the reference, whatever the layout and the tile."""

import random

import pytest
import torch
from torch import Tensor

from transfusion.kernels import IntervalMask, tuning
from transfusion.kernels.mask_tiles import kernel, reference
from transfusion.kernels.testing import random_layout

TILES = sorted({launch[:2] for *_, launch in tuning.launches("sm_90", "attention")})


def lines(tiles: Tensor) -> list[list[int]]:
    """What each line says: its header, and the runs that the header counts."""
    result = []
    for line in tiles.view(-1, reference.WIDTH).tolist():
        masked, full = line[:2]
        header, runs = reference.HEADER, 2 * reference.RUNS
        result.append(line[:header] + line[header:][: 2 * masked] + line[header + runs :][: 2 * full])
    return result


@pytest.mark.parametrize("make", ["query_tiles", "key_tiles"])
def test_as_the_reference(device: None, make: str, seed: int) -> None:
    rng = random.Random(seed)
    masks = [IntervalMask.stack([random_layout(rng, 700).mask() for _ in range(2)])]
    start, end = torch.randint(-9, 410, (2, 1, 333), generator=torch.Generator().manual_seed(seed))
    masks += [IntervalMask(start, end, 400), IntervalMask.sliding_window(900, 70)]
    for mask in masks:
        for block_q, block_k in TILES:
            arguments = (mask.intervals, mask.num_queries, block_q, block_k)
            found, expected = getattr(kernel, make)(*arguments), getattr(reference, make)(*arguments)
            assert lines(found) == lines(expected), (block_q, block_k)
