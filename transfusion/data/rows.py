"""Endless sequences of packed rows, and how several of them are interleaved into one.

    PlannedRows    of a map-style source: row n is a pure function of the seed
    StreamRows     of a stream: blocks of samples, each packed and shuffled on its own; six integers tell its place
    Mix            row g of the whole belongs to one of them, by weight

All depend on the row's number alone: a run reads the same rows in the same order on any number of ranks.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from math import floor
from typing import Generic, Protocol, TypeVar

import torch

from transfusion.data.packing import RowPlan, pack, seeded
from transfusion.data.streams import Stream

_STREAM_STATE = 6  # integers

T = TypeVar("T")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)


class Rows(Protocol[T_co]):
    """`row(n)` -> what may be packed together with it, and which of that lies in row n."""

    def row(self, index: int) -> tuple[Sequence[T_co], list[int]]:
        """Row `index` = 0, 1, 2, ..."""

    def state(self, index: int) -> list[int]:
        """Integers from which `restore` continues at row `index`."""

    def restore(self, state: list[int]) -> None:
        """Continues from `state`. Raises `ValueError` for the state of another kind of source."""

    def change(self, state: list[int]) -> str:
        """How the samples differ from those of `state`, in words; empty where they do not."""


class PlannedRows(Generic[T]):
    """The rows of a map-style deck, made of samples with these `contents`. State: the contents alone."""

    def __init__(self, deck: Sequence[T], plan: RowPlan, contents: "Contents") -> None:
        self.deck, self.plan, self.contents = deck, plan, contents

    def row(self, index: int) -> tuple[Sequence[T], list[int]]:
        """Any row, at any time."""
        return self.deck, self.plan.row(index)

    def state(self, index: int) -> list[int]:
        """What the samples were; a row itself is known by its number."""
        return self.contents.state

    def restore(self, state: list[int]) -> None:
        """Nothing to restore."""
        if len(state) >= _STREAM_STATE - 1:
            raise ValueError("the state is of a stream, but this source is map-style: the data config has changed")

    def change(self, state: list[int]) -> str:
        """How the samples differ from those of `state`, in words; empty where they do not."""
        before, now = state, self.contents.state
        if not before or before == now:
            return ""
        return f"{before[0]} of them, now {now[0]}" if before[0] != now[0] else f"{now[0]} of them, not the same ones"


class Contents:
    """What identifies a list of samples: their number, and a hash of their names or contents."""

    def __init__(self, samples: Iterable[tuple[str, ...]] = ()) -> None:
        self._number, self._hash = 0, hashlib.sha256()
        for sample in samples:
            self.add(*sample)

    def add(self, *words: str) -> None:
        """The next sample."""
        self._number += 1
        for word in words:
            encoded = word.encode(errors="surrogatepass")
            self._hash.update(len(encoded).to_bytes(8, "big") + encoded)

    @property
    def state(self) -> list[int]:
        """[samples, hash]."""
        return [self._number, int.from_bytes(self._hash.digest()[:6], "big")]


class StreamRows(Generic[S, T]):
    """The rows of a stream, in order: `block` samples are read, packed best fit, and their rows shuffled.

    expand: one sample -> the documents of it (none where it is skipped); length: tokens of a document.
    Shards come in another order each epoch. Memory holds one block. State: [first row of the block, its number, epoch,
    place among the epoch's shards, cursor, the stream's identity]; the block is read again from there, or, if the
    shards have changed since, the next epoch begins.
    """

    def __init__(
        self,
        stream: Stream[S],
        expand: Callable[[S], list[T]],
        length: Callable[[T], int],
        row_length: int,
        block: int,
        key: tuple[int, str],
    ) -> None:
        self._stream, self._expand, self._length = stream, expand, length
        self._row_length, self._block, self._key = row_length, block, key
        self._start = [0, 0, 0, 0, 0]
        self._next: list[int] = [0, 0, 0]
        self._deck: list[T] = []
        self._rows: list[list[int]] = []

    def row(self, index: int) -> tuple[Sequence[T], list[int]]:
        """Row `index`, in or after the block that was read last."""
        self._read_up_to(index)
        return self._deck, self._rows[index - self._start[0]]

    def state(self, index: int) -> list[int]:
        """Where the block of row `index` begins."""
        self._read_up_to(index)
        return [*self._start, self._stream.identity]

    def restore(self, state: list[int]) -> None:
        """Reads the block of `state` when its first row is asked for."""
        if len(state) < _STREAM_STATE - 1:
            raise ValueError(f"the state {state} is of a map-style source, but this one is a stream")
        row, number, epoch, place, cursor = state[: _STREAM_STATE - 1]
        self._start = [row, number, 0, 0, 0]
        self._next = [epoch + 1, 0, 0] if self.change(state) else [epoch, place, cursor]
        self._deck, self._rows = [], []

    def change(self, state: list[int]) -> str:
        """A cursor into a shard means nothing in another shard, or after the shard was rewritten."""
        known = state[_STREAM_STATE - 1 :]  # older checkpoints lack it
        return "" if known in ([], [self._stream.identity]) else "its shards are others; its next epoch begins"

    def _read_up_to(self, index: int) -> None:
        assert index >= self._start[0], f"row {index} is before the block that starts at {self._start[0]}"
        epoch = self._next[0]
        while index >= self._start[0] + len(self._rows):
            number = self._start[1] + bool(self._rows)
            self._start = [self._start[0] + len(self._rows), number, *self._next]
            self._deck = []
            for after, sample in islice(self._samples(*self._next), self._block):
                self._next = after
                self._deck += self._expand(sample)
            packed = pack([self._length(document) for document in self._deck], self._row_length)
            order = torch.randperm(len(packed), generator=seeded(*self._key, "block", number), device="cpu").tolist()
            self._rows = [packed[row] for row in order]
            if self._next[0] > epoch + 1 and not self._rows:
                raise ValueError(f"none of the samples in {self._stream.num_shards} shard(s) can be used")

    def _samples(self, epoch: int, place: int, cursor: int) -> Iterator[tuple[list[int], S]]:
        """Endless samples, each with the (epoch, place, cursor) that follows it."""
        found = place > 0 or cursor > 0  # an epoch joined in the middle proves nothing
        while True:
            order = torch.randperm(
                self._stream.num_shards, generator=seeded(*self._key, "shards", epoch), device="cpu"
            ).tolist()
            for shard in range(place, len(order)):
                for after, sample in self._stream.read(order[shard], cursor):
                    found = True
                    yield [epoch, shard, after], sample
                cursor = 0
            if not found:
                last = "".join(f"; skipped {name}: {reason}" for name, reason in self._stream.skipped[-1:])
                raise ValueError(f"no sample in {self._stream.num_shards} shard(s){last}")
            epoch, place, cursor, found = epoch + 1, 0, 0, False


class Mix:
    """Which source each row comes from: of the first n rows, source k has the weighted share, rounded, for every n.

    The first source takes floor(n·p) of n rows, the next floor(its share of the rest), ..., the last what remains.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights must not be negative, and not all zero, got {list(weights)}")
        # exact for floats, and one third stays one third; divided by the largest, so that small weights keep their
        # digits
        exact = [Fraction(weight / max(weights)).limit_denominator(10**12) for weight in weights]
        rest = [sum(exact[k:], Fraction(0)) for k in range(len(exact))]
        self._shares = [weight / total if total else Fraction(0) for weight, total in zip(exact, rest, strict=True)]
        self._last = max(k for k, weight in enumerate(exact) if weight)

    def before(self, row: int) -> list[int]:
        """How many of the first `row` rows each source has."""
        counts = [0] * len(self._shares)
        for source, share in enumerate(self._shares[: self._last]):
            counts[source] = floor(row * share)
            row -= counts[source]
        counts[self._last] = row
        return counts

    def place(self, row: int) -> tuple[int, int]:
        """-> the source of `row`, and how many of that source's rows came before."""
        now, after = self.before(row), self.before(row + 1)
        source = next(k for k in range(len(now)) if after[k] > now[k])
        return source, now[source]
