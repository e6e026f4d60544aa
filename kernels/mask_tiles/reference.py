"""empty, masked or full: what each tile of BLOCK_Q queries × BLOCK_K keys is, as runs of tiles of one kind.

With the smallest and largest query_start and query_end of a key tile, and a query tile [a, b):

    empty    min query_start >= b  or  max query_end <= a      nothing to compute
    full     max query_start <= a  and min query_end >= b      every pair is visible
    masked   anything else                                     pairs are compared with the two vectors

Masked is right for every tile; full and empty only spare work. In a line that has masked tiles, up to FEW full ones are
masked too: a loop of their own would cost more than it spares. A row of the result describes one tile's line:

    [masked runs, full runs, tiles in all, masked tiles,  RUNS × (first, past the last) masked,  RUNS × the same full]

From the first run that would find no place on, everything up to the last tile that is not empty is one masked run: a
row has a fixed width, so all rows together are O(N + M) numbers.
"""

from itertools import groupby

import torch
from torch import Tensor

from transfusion.kernels.registry import TRITON_INTERPRET

RUNS = 15  # which makes a row 256 bytes
HEADER = 4
WIDTH = HEADER + 4 * RUNS
# Of the order of what it costs to start a loop over what it costs to mask a tile; 0 in the interpreter, so that the
# short rows of tests have full tiles.
FEW = 0 if TRITON_INTERPRET else 4
EMPTY, MASKED, FULL = 0, 1, 2


def query_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(N / block_q)·WIDTH) int32: the key tiles of each query tile."""
    return _runs(walked(tile_kinds(intervals, num_queries, block_q, block_k)))


def key_tiles(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, ceil(M / block_k)·WIDTH) int32: the query tiles of each key tile; one that is cut by N is never full."""
    kinds = tile_kinds(intervals, num_queries, block_q, block_k)
    if num_queries % block_q:
        kinds[:, -1].clamp_(max=MASKED)
    return _runs(walked(kinds.mT))


def tile_kinds(intervals: Tensor, num_queries: int, block_q: int, block_k: int) -> Tensor:
    """(B, query tiles, key tiles) of EMPTY, MASKED, FULL. A key past the end is seen by no query."""
    query_start, query_end = intervals.unbind(-1)
    query_end = query_end.masked_fill(query_start == num_queries, 0)  # an empty interval ends before every query
    padding = -query_start.shape[1] % block_k
    start = torch.nn.functional.pad(query_start, (0, padding), value=num_queries).unflatten(1, (-1, block_k))
    end = torch.nn.functional.pad(query_end, (0, padding), value=0).unflatten(1, (-1, block_k))
    first = torch.arange(0, num_queries, block_q, device=start.device)[None, :, None]
    past = (first + block_q).clamp(max=num_queries)
    nonempty = (start.amin(-1)[:, None] < past) & (end.amax(-1)[:, None] > first)
    full = (start.amax(-1)[:, None] <= first) & (end.amin(-1)[:, None] >= past)
    return torch.where(nonempty & full, FULL, torch.where(nonempty, MASKED, EMPTY))


def walked(kinds: Tensor) -> Tensor:
    """The kinds by which lines (B, lines, tiles) are walked: a few full tiles among masked ones are masked."""
    full = kinds == FULL
    few = (full.sum(-1, keepdim=True) <= FEW) & (kinds == MASKED).any(-1, keepdim=True)
    return kinds.masked_fill(few & full, MASKED)


def _runs(kinds: Tensor) -> Tensor:
    rows = [[_row(line) for line in lines] for lines in kinds.tolist()]
    return torch.tensor(rows, dtype=torch.int32, device=kinds.device).view(kinds.shape[0], kinds.shape[1] * WIDTH)


def _row(kinds: list[int]) -> list[int]:
    runs: dict[int, list[tuple[int, int]]] = {MASKED: [], FULL: []}
    end = max((tile + 1 for tile, kind in enumerate(kinds) if kind != EMPTY), default=0)
    position = 0
    for kind, group in groupby(kinds):
        first, position = position, position + len(list(group))
        if kind == EMPTY:
            continue
        # the last place of the masked runs is for the rest
        if len(runs[kind]) == (RUNS - 1 if kind == MASKED else RUNS):
            runs[MASKED].append((first, end))
            break
        runs[kind].append((first, position))
    masked, full = (sum(last - first for first, last in runs[kind]) for kind in (MASKED, FULL))
    header = [len(runs[MASKED]), len(runs[FULL]), masked + full, masked]
    places = [[*sum(runs[kind], ()), *[0] * 2 * (RUNS - len(runs[kind]))] for kind in (MASKED, FULL)]
    return [*header, *places[0], *places[1]]
