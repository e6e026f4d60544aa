"""Packs documents into rows of one length: each document whole, in one row, the rows as full as best fit makes them."""

import operator
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import gcd

import torch
from torch import Tensor


def seeded(*key: int | str) -> torch.Generator:
    """A generator whose state is a hash of `key`, the same on every machine and independent of any other key."""
    # for integers of any kind, numpy's or a tensor's, whose repr would differ
    plain = tuple(each if isinstance(each, str) else operator.index(each) for each in key)
    digest = sha256(repr(plain).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pack(lengths: Sequence[int], row_length: int, per_row: int | None = None) -> list[list[int]]:
    """Best fit, longest first: -> rows of indices into `lengths`, each index once, no row above `row_length` tokens.

    per_row: at most so many documents in a row. O(n log n). Raises `ValueError` for a document that fits no row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that is large enough fits best
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= row_length:
            raise ValueError(f"document {index} of {length} tokens does not fit a row of {row_length} tokens")
        place = bisect_left(open_rows, (length, 0))
        if place < len(open_rows):
            free, row = open_rows.pop(place)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length and len(rows[row]) != per_row:
            insort(open_rows, (free - length, row))
    return rows


@dataclass(frozen=True)
class _Deal:
    """One epoch's shuffle: the order of the rows, and which sample lies in which slot."""

    rows: Tensor
    samples: Tensor


class RowPlan:
    """An endless sequence of rows of samples, `plan.row(0), plan.row(1), ...`, each a pure function of the seed.

    Lengths are packed once. Each epoch then shuffles the rows, and deals samples of equal length anew into the
    slots: every epoch has the same number of rows and the same fill, uses each sample equally often, and row g
    is known without the rows before it.

    per_row: exactly so many documents in every row; each epoch then runs per_row / gcd(n, per_row) times through
    the samples, and `per_row` of the longest must fit a row.
    """

    def __init__(
        self, lengths: Sequence[int], row_length: int, seed: int, name: str, per_row: int | None = None
    ) -> None:
        self._samples = len(lengths)
        repeats = 1 if per_row is None else per_row // gcd(per_row, max(self._samples, 1))
        slots = list(lengths) * repeats
        if per_row is not None and slots and per_row * max(slots) > row_length:
            raise ValueError(
                f"{per_row} documents of up to {max(slots)} tokens do not fit a row of {row_length} tokens; "
                f"use a row length of at least {per_row * max(slots)}"
            )
        self._rows = pack(slots, row_length, per_row)
        self._lengths = torch.tensor(slots, dtype=torch.int64, device="cpu")
        self._by_length = self._lengths.argsort(stable=True)
        self._key = (seed, name)
        self._dealt: dict[int, _Deal] = {}
        self.fill = sum(slots) / (row_length * max(len(self._rows), 1))
        self.mean_documents = len(slots) / max(len(self._rows), 1)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    def row(self, index: int) -> list[int]:
        """The samples of row `index` = 0, 1, 2, ... of the endless sequence."""
        epoch, place = divmod(index, len(self))
        deal = self._deal(epoch)
        slots = self._rows[int(deal.rows[place])]
        return [int(deal.samples[slot]) % self._samples for slot in slots]

    def _deal(self, epoch: int) -> _Deal:
        dealt = self._dealt.get(epoch)
        if dealt is None:
            generator = seeded(*self._key, epoch)
            shuffled = torch.randperm(len(self._lengths), generator=generator, device="cpu")
            samples = torch.empty_like(shuffled)
            samples[self._by_length] = shuffled[self._lengths[shuffled].argsort(stable=True)]
            dealt = _Deal(torch.randperm(len(self), generator=generator, device="cpu"), samples)
            self._dealt = {**{e: d for e, d in self._dealt.items() if abs(e - epoch) < 2}, epoch: dealt}
        return dealt
