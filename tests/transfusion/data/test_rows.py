import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion.data.packing import RowPlan
from transfusion.data.rows import Contents, Mix, PlannedRows, StreamRows


class Numbers:
    """Shards of numbers, each number once; its cursors are odd on purpose: position + 7."""

    def __init__(self, *counts: int) -> None:
        first = 0
        self.shards = []
        for count in counts:
            self.shards.append(list(range(first, first + count)))
            first += count
        self.num_shards, self.skipped, self.total, self.identity = len(counts), [], first, 1

    def read(self, shard: int, start: int = 0):
        for place in range(start - 7 if start else 0, len(self.shards[shard])):
            yield place + 8, self.shards[shard][place]


def _stream_rows(stream: Numbers, seed: int, block: int = 9, expand=lambda number: [(number, 1 + number % 5)]):
    return StreamRows(stream, expand, lambda document: document[1], 10, block, (seed, "test"))


def _documents(rows, numbers) -> list[list[tuple[int, int]]]:
    result = []
    for number in numbers:
        deck, chosen = rows.row(number)
        result.append([deck[k] for k in chosen])
    return result


def test_a_stream_is_used_once_an_epoch_in_shuffled_order():
    seed, stream = random.getrandbits(30), Numbers(17, 0, 5, 30)
    rows = _stream_rows(stream, seed)
    seen: list[int] = []
    for number in range(200):
        (row,) = _documents(rows, [number])
        assert 0 < sum(length for _, length in row) <= 10
        seen += [sample for sample, _ in row]
    counts = Counter(seen)
    assert set(counts) == set(range(52)) and max(counts.values()) - min(counts.values()) <= 1, f"seed {seed}"
    assert seen[:52] != sorted(seen[:52])
    assert _documents(_stream_rows(stream, seed + 1), range(20)) != _documents(_stream_rows(stream, seed), range(20))


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    block=st.integers(1, 20),
    stop=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_a_restored_stream_goes_on_exactly(counts, block, stop, seed):
    stream = Numbers(*counts)
    whole = _documents(_stream_rows(stream, seed, block), range(stop + 15))
    rows = _stream_rows(stream, seed, block)
    _documents(rows, range(random.randint(0, stop)))
    state = rows.state(stop)
    assert all(type(number) is int for number in state)
    again = _stream_rows(stream, seed, block)
    again.restore(state)
    assert _documents(again, range(stop, stop + 15)) == whole[stop:]
    assert again.state(stop + 14) == rows.state(stop + 14)


def test_samples_that_make_no_document_are_passed_over():
    rows = _stream_rows(Numbers(40), 3, 2, lambda number: [(number, 3)] if number % 10 == 0 else [])
    assert {sample for row in _documents(rows, range(12)) for sample, _ in row} == {0, 10, 20, 30}


@pytest.mark.parametrize(
    ("stream", "expand", "message"),
    [
        (Numbers(0, 0), lambda number: [(number, 1)], r"no sample in 2 shard\(s\)"),
        (Numbers(4, 3), lambda number: [], r"none of the samples in 2 shard\(s\) can be used"),
    ],
)
def test_a_stream_without_any_sample_ends_with_a_reason(stream, expand, message):
    with pytest.raises(ValueError, match=message):
        _stream_rows(stream, 0, 3, expand).row(0)


def test_a_stream_of_other_shards_begins_its_next_epoch():
    """A place in one file is none in another: a sample cut in two would be the least of it."""
    before = _stream_rows(Numbers(13, 17), 3)
    state = before.state(4)
    changed = Numbers(13, 18)
    changed.identity = 2
    rows, fresh = _stream_rows(changed, 3), _stream_rows(changed, 3)
    assert not before.change(state) and "its shards are others" in rows.change(state)
    rows.restore(state)
    fresh.restore([*state[:2], state[2] + 1, 0, 0, 2])
    assert _documents(rows, range(4, 9)) == _documents(fresh, range(4, 9))


def test_states_of_another_kind_of_source_are_refused():
    planned = PlannedRows([1, 2], RowPlan([1, 2], 4, 0, "x"), Contents())
    planned.restore(planned.state(5))
    with pytest.raises(ValueError, match="map-style"):
        planned.restore([0] * 6)
    old = _stream_rows(Numbers(13, 17), 3)
    state = old.state(4)[:5]  # of a checkpoint that says nothing of the shards
    again = _stream_rows(Numbers(13, 17), 3)
    again.restore(state)
    assert not again.change(state) and _documents(again, range(4, 9)) == _documents(old, range(4, 9))
    with pytest.raises(ValueError, match="stream"):
        _stream_rows(Numbers(3), 0).restore([])


@given(st.lists(st.floats(0, 5), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.01))
def test_a_mix_has_the_shares_at_every_length(weights):
    mix = Mix(weights)
    counts = [0] * len(weights)
    for row in range(200):
        assert mix.before(row) == counts
        source, before = mix.place(row)
        assert before == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (row + 1) * weight / sum(weights)) < len(weights) + (row + 1) * 2e-3
    assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)


def test_a_small_weight_is_not_none():
    assert Mix([1, 9999]).before(10**6) == [100, 999_900]
    assert Mix([1 / 40_002, 20_000 / 40_002, 0.5]).before(10**6)[0] in (24, 25)
    assert Mix([0.3, 0.7]).before(10) == [3, 7] and Mix([1 / 3, 2 / 3]).before(3 * 10**6) == [10**6, 2 * 10**6]


def test_a_mix_of_two_alternates_and_bad_weights_are_named():
    assert [Mix([0.5, 0.5]).place(row)[0] for row in range(4)] == [1, 0, 1, 0]
    assert list(islice((Mix([1, 3]).place(row)[0] for row in range(8)), 8)).count(0) == 2
    for weights in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="weights"):
            Mix(weights)
