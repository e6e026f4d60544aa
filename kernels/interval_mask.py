"""Query i sees key j  iff  query_start[j] <= i < query_end[j].

A text token sees every earlier token of its document; an image token sees that and the rest of its own
image. Turned around, the queries that may see key j are one contiguous interval: from j itself (text) or
from the start of j's image, to the end of j's document. So the whole mask is two int32 vectors.
"""

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transfusion.kernels.mask_tiles.op import key_tiles, query_tiles
from transfusion.kernels.mask_tiles.reference import FULL, MASKED, tile_kinds
from transfusion.kernels.registry import check_tensor, whole
from transfusion.kernels.transfer import moved

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Span = tuple[int, int]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class IntervalMask:
    """The mask as `query_start`, `query_end`: (B or 1, M) int32, one interval of queries per key.

    A leading 1 broadcasts over the batch. `intervals` (B or 1, M, 2) holds both, as kernels read them: cut to
    [0, num_queries), an empty one as (num_queries, num_queries). Immutable; what is derived from it (tiles, the dense
    form) is built once, on its device and without a host sync, and kept with it.
    """

    def __init__(self, query_start: Tensor, query_end: Tensor, num_queries: int) -> None:
        num_queries = whole("num_queries", num_queries, 0)
        _check_vectors(query_start, query_end, num_queries)
        start, end = query_start.clamp(min=0), query_end.clamp(max=num_queries)
        empty = end <= start
        self._hold(
            torch.stack([start, end], -1).masked_fill(empty[..., None], num_queries).to(torch.int32), num_queries
        )

    def _hold(self, intervals: Tensor, num_queries: int) -> None:
        if not torch.compiler.is_compiling() and intervals.is_inference():  # which no backward could save
            with torch.inference_mode(False):
                intervals = intervals.clone()
        self.intervals, self.num_queries = intervals, num_queries
        self._derived: dict[object, Any] = {}
        self._in_graph = _is_capturing(intervals)  # a CUDA graph's own: it is computed when the graph is replayed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": {}}  # a copy makes its own, and a file needs none

    # ---------------------------------------------------------------- makers

    @staticmethod
    def from_spans(
        length: int,
        images: Iterable[Span] = (),
        documents: Sequence[int] | None = None,
        hidden_images: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> "IntervalMask":
        """One row of `length` tokens from Python lists.

        `images`: half-open spans; `documents`: their lengths, which add up to `length` (default: one document);
        `hidden_images`: indices into `images` of those that only their own tokens may see (noised copies). Raises
        `ValueError` naming a span that overlaps, is empty, out of range, or crosses a document's end. Inside a compiled
        function use `from_ids`.
        """
        length = whole("length", length, 1)
        lengths = [length] if documents is None else [whole("a document's length", each) for each in documents]
        images = [_span(each) for each in images]
        _check_documents(length, lengths)
        device = torch.get_default_device() if device is None else device
        ends = list(accumulate(lengths))
        _check_spans(length, images, ends)
        start = torch.arange(length, device="cpu")
        end, each = (torch.tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (ends, lengths))
        end = torch.repeat_interleave(end, each, output_size=length)
        for first, last in images:
            start[first:last] = first
        for given in hidden_images:
            index = whole("an index in hidden_images", given)
            if isinstance(given, bool) or not 0 <= index < len(images):
                raise ValueError(f"hidden_images: {index} is no index into the {len(images)} images")
            first, last = images[index]
            end[first:last] = last
        return IntervalMask(start[None].to(device), end[None].to(device), length)

    @staticmethod
    def from_ids(image_ids: Tensor, document_ids: Tensor | None = None, hidden: Tensor | None = None) -> "IntervalMask":
        """B rows from ids on the device, without a host sync.

        image_ids (B, N) int: equal non-negative ids side by side are one image, -1 is text. document_ids (B, N)
        int: equal ids side by side are one document (default: the row). hidden (B, N) bool: tokens of images that only
        their own tokens may see.
        """
        _check_kind("image_ids", image_ids, "(B, N) of integers", _INTEGERS)
        if document_ids is not None:
            _check_kind("document_ids", document_ids, "(B, N) of integers", _INTEGERS)
        if hidden is not None:
            _check_kind("hidden", hidden, "(B, N) of bools, True for tokens of hidden images", (torch.bool,))
        if image_ids.ndim != 2:
            raise ValueError(f"image_ids must be (B, N), got {tuple(image_ids.shape)}; one row is image_ids[None]")
        for name, tensor in (("document_ids", document_ids), ("hidden", hidden)):
            if tensor is not None and tensor.shape != image_ids.shape:
                raise ValueError(f"{name} must be (B, N) = {tuple(image_ids.shape)}, got {tuple(tensor.shape)}")
            if tensor is not None and tensor.device != image_ids.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, image_ids on {image_ids.device}; move it with .to(...)"
                )
        if not image_ids.numel():
            raise ValueError(f"image_ids of shape {tuple(image_ids.shape)} hold no token; give at least one row of one")
        documents = torch.zeros_like(image_ids) if document_ids is None else document_ids
        new_document = _changes(documents)
        new_run = _changes(image_ids) | new_document
        index = torch.arange(image_ids.shape[1], device=image_ids.device).expand_as(image_ids)
        start = torch.where(image_ids >= 0, _run_start(new_run, index), index)
        end = _run_end(new_document, index)
        if hidden is not None:
            end = torch.where(hidden & (image_ids >= 0), _run_end(new_run, index), end)
        return IntervalMask(start, end, image_ids.shape[1])

    @staticmethod
    def causal(length: int, device: torch.device | str | None = None) -> "IntervalMask":
        """Query i sees keys 0..i."""
        length = whole("length", length, 0)
        index = torch.arange(length, device=device)[None]
        return IntervalMask(index, torch.full_like(index, length), length)

    @staticmethod
    def full(num_queries: int, num_keys: int, device: torch.device | str | None = None) -> "IntervalMask":
        """Every query sees every key."""
        num_queries, num_keys = whole("num_queries", num_queries, 0), whole("num_keys", num_keys, 0)
        zero = torch.zeros(1, num_keys, dtype=torch.int64, device=device)
        return IntervalMask(zero, zero + num_queries, num_queries)

    @staticmethod
    def prefix_lm(length: int, prefix: int, device: torch.device | str | None = None) -> "IntervalMask":
        """Bidirectional over the first `prefix` tokens, causal after."""
        length, prefix = whole("length", length, 0), whole("prefix", prefix, 0)
        if not 0 <= prefix <= length:
            raise ValueError(f"prefix must be within 0..{length}, got {prefix}")
        index = torch.arange(length, device=device)[None]
        return IntervalMask(torch.where(index < prefix, 0, index), torch.full_like(index, length), length)

    @staticmethod
    def sliding_window(length: int, window: int, device: torch.device | str | None = None) -> "IntervalMask":
        """Query i sees keys i - window + 1 .. i."""
        length, window = whole("length", length, 0), whole("window", window, 1)
        index = torch.arange(length, device=device)[None]
        return IntervalMask(index, index + min(window, length), length)

    @staticmethod
    def continuation(new: "IntervalMask", prefix_lengths: Tensor, num_keys: int) -> "IntervalMask":
        """N new queries after a cached prefix: row b's keys are its prefix, then the new tokens, then unused room.

        `new`: the mask among the N new tokens themselves; `prefix_lengths` (B,) int on the device of `new`;
        `num_keys`: the cache's capacity M. Key j < prefix_lengths[b] is seen by every new query, key
        prefix_lengths[b] + i as new token i, the rest by none. Needs 0 <= prefix_lengths[b] <= M - N, which is not
        checked: the host would have to wait for the device.
        """
        check_mask("new", new)
        _check_kind("prefix_lengths", prefix_lengths, "(B,) of integers", _INTEGERS)
        if prefix_lengths.ndim != 1:
            raise ValueError(f"prefix_lengths must be (B,), got shape {tuple(prefix_lengths.shape)}")
        if new.batch_size != 1 and new.batch_size != prefix_lengths.shape[0]:  # see attention/op.py
            raise ValueError(
                f"{prefix_lengths.shape[0]} prefix_lengths for a mask of {new.batch_size} rows; give one for each"
            )
        if prefix_lengths.device != new.device:
            raise ValueError(f"prefix_lengths are on {prefix_lengths.device}, the mask on {new.device}; use .to(...)")
        if new.num_queries != new.num_keys:
            raise ValueError(f"new={new} must be a mask of new tokens among themselves, as many keys as queries")
        num_keys = whole("num_keys", num_keys, 0)
        if num_keys < new.num_queries:
            raise ValueError(f"a cache of num_keys={num_keys} has no room for {new.num_queries} new tokens")
        key = torch.arange(num_keys, device=new.query_start.device)[None]
        if new.num_queries == 1:  # few launches: a decoding step waits for them
            hidden = key > prefix_lengths[:, None] - new.query_start
            mask = object.__new__(IntervalMask)
            mask._hold(torch.stack([hidden, torch.ones_like(hidden)], -1).to(torch.int32), 1)
            return mask
        offset = key - prefix_lengths[:, None]
        inside = (offset >= 0) & (offset < new.num_keys)
        batch = prefix_lengths.shape[0]
        source = offset.clamp(0, new.num_keys - 1)
        start = new.query_start.expand(batch, -1).gather(1, source).masked_fill(~inside, 0)
        end = new.query_end.expand(batch, -1).gather(1, source)
        end = torch.where(inside, end, torch.where(offset < 0, new.num_queries, 0))
        return IntervalMask(start, end, new.num_queries)

    @staticmethod
    def stack(masks: Iterable["IntervalMask"]) -> "IntervalMask":
        """The rows of several masks of one size as one batch."""
        masks = list(masks)
        for mask in masks:
            check_mask("each of masks", mask)
        if not masks:
            raise ValueError("stack needs at least one mask, got none")
        # compared one by one: a set would fix symbolic sizes in a graph
        if any((m.num_queries, m.num_keys) != (masks[0].num_queries, masks[0].num_keys) for m in masks):
            sizes = sorted({(mask.num_queries, mask.num_keys) for mask in masks})
            raise ValueError(f"stack needs masks of one (num_queries, num_keys), got {sizes}")
        if any(mask.device != masks[0].device for mask in masks):
            raise ValueError(f"stack needs masks on one device, got {sorted({str(mask.device) for mask in masks})}")
        starts, ends = [mask.query_start for mask in masks], [mask.query_end for mask in masks]
        return IntervalMask(torch.cat(starts), torch.cat(ends), masks[0].num_queries)

    # ---------------------------------------------------------------- facts

    @property
    def query_start(self) -> Tensor:
        """(B or 1, M) int32: the first query that sees each key."""
        return self.intervals[..., 0]

    @property
    def query_end(self) -> Tensor:
        """(B or 1, M) int32: one past the last query that sees each key."""
        return self.intervals[..., 1]

    @property
    def num_keys(self) -> int:
        """M."""
        return self.intervals.shape[1]

    @property
    def batch_size(self) -> int:
        """B, or 1 where one row serves every batch element."""
        return self.intervals.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""
        return self.intervals.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "IntervalMask":
        """The same mask on `device`, see `transfer.moved`."""
        intervals = moved(self.intervals, device, non_blocking)
        if intervals is self.intervals:
            return self
        mask = object.__new__(IntervalMask)  # checked and cut already: nothing more to launch on the device
        mask._hold(intervals, self.num_queries)
        return mask

    def area(self) -> Tensor:
        """Σ_j |interval j|: visible (query, key) pairs of each row, (B or 1,) int64. FLOPs are counted from it."""
        return (self.query_end.long() - self.query_start.long()).sum(1)

    def to_dense(self) -> Tensor:
        """(B or 1, N, M) bool, made anew: the definition spelled out, the oracle of every test."""
        query = torch.arange(self.num_queries, device=self.device)[None, :, None]
        return (self.query_start[:, None, :] <= query) & (query < self.query_end[:, None, :])

    # ---------------------------------------------------------------- tiles

    def query_tiles(self, block_q: int, block_k: int) -> Tensor:
        """(B or 1, ceil(N / block_q)·WIDTH) int32: each query tile's runs of masked and of full key tiles.

        See `transfusion.kernels.mask_tiles.reference`. What is in no run is empty.
        """
        return self.once(
            ("query_tiles", block_q, block_k),
            lambda: query_tiles(self.intervals, self.num_queries, *_sides(block_q, block_k)),
        )

    def key_tiles(self, block_k: int, block_q: int) -> Tensor:
        """(B or 1, ceil(M / block_k)·WIDTH) int32: the same for each key tile, in query tiles."""
        return self.once(
            ("key_tiles", block_k, block_q),
            lambda: key_tiles(self.intervals, self.num_queries, *_sides(block_q, block_k)),
        )

    def to_block_mask(self, block_size: int = 128) -> "BlockMask":
        """The same mask for FlexAttention, from tile extremes: no dense mask, no element evaluated."""
        from torch.nn.attention.flex_attention import BlockMask

        block_size = whole("block_size", block_size, 1)
        kinds = tile_kinds(self.intervals, self.num_queries, block_size, block_size)
        start, end, rows = self.query_start.contiguous(), self.query_end.contiguous(), self.batch_size

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            row = b if rows > 1 else b * 0
            return (start[row, kv] <= q) & (q < end[row, kv])

        return BlockMask.from_kv_blocks(
            *_block_list(kinds == MASKED),
            *_block_list(kinds == FULL),
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=(self.num_queries, self.num_keys),
        )

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """`make()` at the first call with `key`, kept with the mask. Not kept where later calls could not use it: fake
        tensors of a trace, and what a CUDA graph under capture will compute.
        """
        if key in self._derived:
            return self._derived[key]
        if torch.compiler.is_dynamo_compiling():
            self._derived[key] = make()
            return self._derived[key]
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            made = make()
        if not is_traced() and (self._in_graph or not _is_capturing(self.intervals)):
            self._derived[key] = made
        return made

    def __repr__(self) -> str:
        sizes = f"batch_size={self.batch_size}, num_queries={self.num_queries}, num_keys={self.num_keys}"
        return f"IntervalMask({sizes}, device={str(self.device)!r})"


def is_traced() -> bool:
    """Whether tensors have no numbers: under a FakeTensorMode, an export, or `make_fx` of fake tensors."""
    return torch._guards.detect_fake_mode() is not None


def _is_capturing(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _block_list(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, Tq) counts and (B, 1, Tq, Tk) indices, the wanted tiles first, as FlexAttention lists them."""
    counts = tiles.sum(-1, dtype=torch.int32)
    indices = tiles.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None].contiguous(), indices[:, None].contiguous()


def _changes(ids: Tensor) -> Tensor:
    """True where a run of equal ids begins."""
    first = torch.ones_like(ids[:, :1], dtype=torch.bool)
    return torch.cat([first, ids[:, 1:] != ids[:, :-1]], dim=1)


def _run_start(begins: Tensor, index: Tensor) -> Tensor:
    return torch.where(begins, index, 0).cummax(1).values


def _run_end(begins: Tensor, index: Tensor) -> Tensor:
    """One past the last token of each token's run: the next beginning, or the row's length."""
    length = index.shape[1]
    following = torch.where(begins, index, length)[:, 1:]
    following = torch.cat(
        [following, torch.full_like(index[:, :1], length)], 1
    )  # `pad` would fix the length in a graph
    return following.flip(1).cummin(1).values.flip(1)


def _check_kind(name: str, value: Tensor, wanted: str, dtypes: Sequence[torch.dtype]) -> None:
    check_tensor(name, value, f" {wanted}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}; use .to({dtypes[-1]})")


def check_mask(name: str, value: object) -> None:
    """Raises `TypeError` unless `value` is an `IntervalMask`."""
    if not isinstance(value, IntervalMask):
        raise TypeError(f"{name} must be an IntervalMask, got {type(value).__name__}")


def _sides(block_q: int, block_k: int) -> tuple[int, int]:
    """Of a tile."""
    return whole("block_q", block_q, 1), whole("block_k", block_k, 1)


def _span(span: Any) -> Span:
    try:
        first, last = span
        return operator.index(first), operator.index(last)
    except (TypeError, ValueError):
        raise TypeError(f"images must be pairs of whole numbers, (first, one past the last), got {span!r}") from None


def _check_vectors(start: Tensor, end: Tensor, num_queries: int) -> None:
    for name, tensor in (("query_start", start), ("query_end", end)):
        check_tensor(name, tensor, " (B, M)")
    if start.ndim != 2 or start.shape != end.shape:
        raise ValueError(
            f"query_start and query_end must both be (B, M), got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    for name, tensor in (("query_start", start), ("query_end", end)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if start.device != end.device:
        raise ValueError(f"query_start is on {start.device}, query_end on {end.device}")
    if num_queries >= 2**31:
        raise ValueError(f"a mask holds 32-bit numbers: {num_queries} queries are too many, at most {2**31 - 1}")
    if num_queries < 1 or start.shape[1] < 1:
        raise ValueError(f"a mask needs at least one query and one key, got {num_queries} and {start.shape[1]}")


def _check_documents(length: int, lengths: list[int]) -> None:
    for index, size in enumerate(lengths):
        if size < 1:
            raise ValueError(f"document {index} has length {size}; a document holds at least one token")
    if sum(lengths) != length:
        raise ValueError(f"documents of lengths {lengths} add up to {sum(lengths)}, not to the row's length {length}")


def _check_spans(length: int, images: Sequence[Span], ends: list[int]) -> None:
    previous = (0, 0)
    for span in sorted(images):
        first, last = span
        if first >= last:
            raise ValueError(f"image span {span} is empty: give (first, one past the last)")
        if first < 0 or last > length:
            raise ValueError(f"image span {span} is out of range for a row of {length} tokens")
        if first < previous[1]:
            raise ValueError(f"image spans {previous} and {span} overlap")
        end = ends[bisect_right(ends, first)]
        if end < last:
            raise ValueError(f"image span {span} crosses the end of its document at {end}")
        previous = span
