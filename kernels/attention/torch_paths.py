"""The same mask through PyTorch's own attention: SDPA under the dense mask, FlexAttention under a BlockMask.

SDPA is what `auto` takes where no Triton kernel runs; both are baselines of the benchmarks. What they need of the mask
is built once per `IntervalMask` and kept with it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from transfusion.kernels.interval_mask import IntervalMask, is_traced

_WORTH_CUTTING = 0.5  # of the dense mask's pairs: what is saved has to pay for the copies
_LENGTHS = 8  # in which pieces come


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """`dense_sdpa`; on a CPU, where that leaves far fewer pairs, packed rows are first cut between documents, where no
    interval crosses, and pieces of about one length go through together.
    """
    pieces = prepare(mask)
    if pieces is None or not q.shape[0]:  # no heads then, which crashes torch 2.11
        return dense_sdpa(q, k, v, mask, scale)
    # (B·N, H, D); for a mask of one row (N, B·H, D), since rows that are cut alike can go through as heads
    broadcast = mask.batch_size == 1
    rows = [t.permute(2, 0, 1, 3).flatten(1, 2) if broadcast else t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    parts = []
    for places, visible in pieces.groups:
        shape = (visible.shape[0], visible.shape[-1])
        query, key, value = (t.index_select(0, places).unflatten(0, shape).transpose(1, 2) for t in rows)
        out = _attention(query, key, value, visible, scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    whole = torch.cat(parts).index_select(0, pieces.origin)
    if broadcast:
        return whole.unflatten(1, q.shape[:2]).permute(1, 2, 0, 3)
    return whole.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """`scaled_dot_product_attention` under the dense mask: O(N·M) bytes for the mask."""
    return _attention(q, k, v, prepare_dense(mask), scale)


def prepare_dense(mask: IntervalMask) -> Tensor | None:
    """(B or 1, 1, N, M) bool, kept with the mask; on a CPU, which can look, None where every query sees every key.

    In a graph it is made each time: kept and not kept would be two graphs, and under checkpointing nothing may be kept.
    """
    return _dense(mask) if torch.compiler.is_dynamo_compiling() else mask.once("dense", lambda: _dense(mask))


def _dense(mask: IntervalMask) -> Tensor | None:
    visible = mask.to_dense()[:, None]
    return None if _can_look(mask) and visible.all() else visible


def _can_look(mask: IntervalMask) -> bool:
    """Whether the host may read the mask. Not on a GPU, which the host would wait for, nor in a graph, which would
    break, nor under a trace or torch.func, where there may be no numbers."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or is_traced():
        return False
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxies is None and not torch._C._are_functorch_transforms_active()


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=scale, enable_gqa=_is_grouped(q, k)
    )


def _is_grouped(q: Tensor, k: Tensor) -> bool:
    """In a graph of symbolic sizes too, which decides here: their comparison is no bool."""
    grouped = False
    if q.shape[1] != k.shape[1]:
        grouped = True
    return grouped


def prepare(mask: IntervalMask) -> "Pieces | None":
    """What `sdpa` makes of a new batch's mask, kept with it: the pieces, or None and the dense mask."""
    if _can_look(mask):
        pieces: Pieces | None = mask.once("pieces", lambda: cut(mask))
        if pieces is not None:
            return pieces
    prepare_dense(mask)
    return None


class Pieces(NamedTuple):
    """Stretches of packed rows, in groups of about one length, each padded to L tokens.

    groups: (places (P·L,), visible (P, 1, L, L)) of each: the flat b·N + i of every token of its P pieces, and its
    mask; padding is the piece's first token again, which sees itself. origin (B·N,): where in all groups together each
    token went.
    """

    groups: list[tuple[Tensor, Tensor]]
    origin: Tensor


def cut(mask: IntervalMask) -> Pieces | None:
    """The mask's rows cut into pieces, or None where that saves too little."""
    count = mask.num_queries
    if mask.num_keys != count or mask.batch_size == 0:
        return None
    step = max(-(-count // _LENGTHS), 32)
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for b, row in enumerate(zip(mask.query_start.tolist(), mask.query_end.tolist(), strict=True)):
        for first, last in _joined(_stretches(*row), step):
            groups.setdefault(-(-(last - first) // step) * step, []).append((b, first, last))
    pairs = sum(len(pieces) * length**2 for length, pieces in groups.items())
    if pairs > _WORTH_CUTTING * mask.batch_size * count**2:
        return None
    origin = torch.empty(mask.batch_size, count, dtype=torch.int64, device="cpu")
    made, before = [], 0
    for length, pieces in groups.items():
        made.append(_group(mask, pieces, length, origin, before))
        before += len(pieces) * length
    return Pieces(made, origin.flatten())


def _group(
    mask: IntervalMask, pieces: list[tuple[int, int, int]], length: int, origin: Tensor, before: int
) -> tuple[Tensor, Tensor]:
    places = torch.empty(len(pieces), length, dtype=torch.int64, device="cpu")
    visible = torch.eye(length, dtype=torch.bool, device="cpu").expand(len(pieces), 1, -1, -1).clone()
    for number, (b, first, last) in enumerate(pieces):
        size, query = last - first, torch.arange(first, last, device="cpu")
        places[number] = b * mask.num_queries + first  # not from another piece: a NaN there would spread
        places[number, :size] = b * mask.num_queries + query
        origin[b, first:last] = before + number * length + torch.arange(size, device="cpu")
        start, end = mask.query_start[b, first:last], mask.query_end[b, first:last]
        visible[number, 0, :size, :size] = (start <= query[:, None]) & (query[:, None] < end)
    return places.flatten(), visible


def _stretches(start: list[int], end: list[int]) -> list[tuple[int, int]]:
    """The row cut wherever no key before is seen after, and no key after is seen before."""
    count = len(start)
    earliest = [count] * (count + 1)
    for j in reversed(range(count)):
        earliest[j] = min(earliest[j + 1], start[j] if start[j] < end[j] else count)
    stretches, first, reach = [], 0, 0
    for j in range(count):
        reach = max(reach, end[j] if start[j] < end[j] else 0)
        if reach <= j + 1 <= earliest[j + 1]:
            stretches.append((first, j + 1))
            first = j + 1
    return stretches if first == count else [*stretches, (first, count)]


def _joined(stretches: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Neighbours joined up to `most` tokens."""
    joined: list[tuple[int, int]] = []
    for first, last in stretches:
        if joined and last - joined[-1][0] <= most:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def prepare_flex(mask: IntervalMask) -> Any:
    """The block mask of `flex`, kept with the mask."""
    return mask.once("block_mask", mask.to_block_mask)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Compiled `flex_attention`; a block mask of one row broadcasts over the batch."""
    from torch.nn.attention.flex_attention import flex_attention

    compiling = torch.compiler.is_compiling()
    attention: Callable[..., Any] = flex_attention if compiling else _compiled_flex()  # type: ignore[assignment]
    result: Tensor = attention(
        q,
        k,
        v,
        block_mask=prepare_flex(mask),
        scale=scale,
        enable_gqa=_is_grouped(q, k),
    )
    return result


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
