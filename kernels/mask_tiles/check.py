"""How the kernels of `mask_tiles` are judged: the runs of tiles that they list are the reference's, to the number."""

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from transfusion.kernels.interval_mask import IntervalMask
from transfusion.kernels.mask_tiles import reference
from transfusion.kernels.mask_tiles.reference import HEADER, RUNS, WIDTH
from transfusion.kernels.testing import LAYOUTS, Verdict, random_layout

_BLOCKS = (32, 16)


def listed(lines: Tensor) -> Tensor:
    """(B, tiles, WIDTH): 0 in the places of runs that are not there, which kernels leave as they are."""
    lines = lines.unflatten(1, (-1, WIDTH))
    place = torch.arange(2 * RUNS, device=lines.device)
    absent = torch.cat([place >= 2 * lines[..., kind : kind + 1] for kind in (0, 1)], -1)
    return torch.cat([lines[..., :HEADER], lines[..., HEADER:].masked_fill(absent, 0)], -1)


def verdicts(mask: IntervalMask, block_q: int, block_k: int) -> dict[str, Verdict]:
    """Numbers of the Triton kernels' lines that are not the reference's; none may be."""
    from transfusion.kernels.mask_tiles import kernel

    call = mask.intervals, mask.num_queries, block_q, block_k
    wrong = {
        name: listed(getattr(kernel, name)(*call)) != listed(getattr(reference, name)(*call))
        for name in ("query_tiles", "key_tiles")
    }
    return {name: Verdict(float(each.sum()), 0.0) for name, each in wrong.items()}


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], dict[str, Verdict]]]]:
    """(what, a call that judges it), in turn: the layouts, a batch of random rows, more runs than a line has room for,
    and lines so long that a program reads them in several turns."""
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    masks = {name: layout.mask() for name, layout in LAYOUTS.items()}
    masks["random_2_by_333"] = IntervalMask.stack([random_layout(rng, 333).mask() for _ in range(2)])
    stripe = torch.arange(900, device="cpu")[None] // 16 % 2
    masks["stripes_40_by_900"] = IntervalMask(torch.zeros_like(stripe), torch.where(stripe == 0, 40, 11), 40)
    for name, mask in masks.items():
        yield name, partial(verdicts, mask.to(device), *_BLOCKS)
    yield "causal_5000", partial(verdicts, IntervalMask.causal(5000, device), 128, 32)
