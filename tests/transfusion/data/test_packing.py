import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion.data.packing import RowPlan, pack, seeded
from transfusion.sequence import Image, SpecialTokens, Text, collate, document_length

SPECIAL = SpecialTokens()
PATCH = 2


@st.composite
def documents(draw):
    """A document of text runs and images; every text token is unique in the test, so that its place can be read."""
    segments = []
    for kind in draw(st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=4)):
        segments.append(draw(st.integers(1, 9)) if kind == "text" else kind)
    return segments


def _realise(layouts):
    fresh = iter(range(5, 10_000))
    return [
        tuple(
            Image(torch.zeros(1, 2 * PATCH, PATCH))
            if segment == "image"
            else Text(torch.tensor([next(fresh) for _ in range(segment)]))
            for segment in layout
        )
        for layout in layouts
    ]


def _expected_tokens(document):
    tokens = []
    for segment in document:
        tokens += segment.token_ids.tolist() if isinstance(segment, Text) else [SPECIAL.boi, 0, 0, SPECIAL.eoi]
    return tokens


@given(st.lists(documents(), max_size=25), st.integers(0, 30))
@settings(deadline=None, max_examples=150)
def test_every_document_comes_out_whole_once_and_apart(layouts, slack):
    docs = _realise(layouts)
    lengths = [document_length(document, PATCH) for document in docs]
    row_length = max(lengths, default=1) + slack
    rows = pack(lengths, row_length)
    assert Counter(i for row in rows for i in row) == Counter(range(len(docs)))
    assert all(sum(lengths[i] for i in row) <= row_length for row in rows)
    if not rows:
        return
    batch = collate([[docs[i] for i in row] for row in rows], row_length, PATCH, SPECIAL, torch.Generator())
    visible = batch.mask.to_dense().expand(len(rows), -1, -1)
    for b, row in enumerate(rows):
        start = 0
        for index in row:
            end = start + lengths[index]
            assert batch.token_ids[b, start:end].tolist() == _expected_tokens(docs[index])
            assert batch.positions[b, start:end].tolist() == list(range(end - start))
            outside = torch.ones(row_length, dtype=torch.bool)
            outside[start:end] = False
            assert not visible[b, start:end, outside].any() and not visible[b, outside, start:end].any()
            start = end
        assert (batch.token_ids[b, start:] == SPECIAL.pad).all()


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(1, 9))
def test_at_most_per_row_documents_and_no_row_that_another_could_hold(lengths, per_row):
    rows = pack(lengths, 64, per_row)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < len(row) <= per_row and sum(lengths[i] for i in row) <= 64 for row in rows)
    # Best fit leaves no two rows that fit into one, unless the count forbids it.
    loads = sorted((sum(lengths[i] for i in row), len(row)) for row in rows)
    for (first, count), (second, other) in pairwise(loads):
        assert first + second > 64 or count + other > per_row


def test_best_fit_takes_the_tightest_row():
    rows = pack([6, 7, 3, 4, 1], 10)
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 2], [4]]


@pytest.mark.parametrize("length", [0, 65])
def test_a_document_that_fits_no_row_is_named(length):
    with pytest.raises(ValueError, match=rf"document 1 of {length} tokens .* 64"):
        pack([3, length], 64)


def test_seeded_generators_differ_in_every_part_of_the_key():
    states = [
        torch.rand(4, generator=seeded(*key)).tolist() for key in [(1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2)]
    ]
    assert len({tuple(state) for state in states}) == 4
    assert torch.rand(4, generator=seeded(1, "a", 2)).tolist() == states[0]


@pytest.fixture
def lengths():
    return [random.randint(3, 20) for _ in range(random.randint(30, 60))]


def test_every_epoch_uses_every_sample_once_in_another_order(lengths):
    seed = random.getrandbits(32)
    plan = RowPlan(lengths, 40, seed, "x")
    epochs = [[plan.row(epoch * len(plan) + place) for place in range(len(plan))] for epoch in range(3)]
    for rows in epochs:
        assert sorted(i for row in rows for i in row) == list(range(len(lengths))), f"seed {seed}"
        assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert epochs[0] != epochs[1] != epochs[2], f"seed {seed}"
    assert plan.fill == sum(lengths) / (40 * len(plan))
    assert plan.mean_documents == len(lengths) / len(plan)


def test_neighbours_in_a_row_change_with_the_epoch():
    plan = RowPlan([10] * 40, 40, random.getrandbits(32), "x")
    neighbours = [{frozenset(plan.row(epoch * len(plan) + r)) for r in range(len(plan))} for epoch in range(2)]
    assert neighbours[0] != neighbours[1] and plan.fill == 1


def test_a_row_is_a_function_of_its_index_and_the_seed(lengths):
    seed = random.getrandbits(32)
    plan = RowPlan(lengths, 40, seed, "x")
    rows = [plan.row(g) for g in range(4 * len(plan))]
    for g in random.sample(range(len(rows)), min(40, len(rows))):
        assert plan.row(g) == rows[g], f"seed {seed}"
    assert RowPlan(lengths, 40, seed, "x").row(len(rows) - 1) == rows[-1]
    assert [RowPlan(lengths, 40, seed + 1, "x").row(g) for g in range(len(plan))] != rows[: len(plan)]


@pytest.mark.parametrize(("samples", "per_row"), [(12, 4), (10, 4), (7, 3), (1, 5), (9, 1)])
def test_per_row_is_exact_and_fair(samples, per_row):
    lengths = [random.randint(1, 10) for _ in range(samples)]
    plan = RowPlan(lengths, 10 * per_row, random.getrandbits(32), "x", per_row)
    rows = [plan.row(g) for g in range(2 * len(plan))]
    assert {len(row) for row in rows} == {per_row}
    uses = Counter(i for row in rows[: len(plan)] for i in row)
    assert set(uses) == set(range(samples)) and len(set(uses.values())) == 1


def test_per_row_that_does_not_fit_names_the_length_that_would():
    with pytest.raises(ValueError, match="at least 80"):
        RowPlan([20, 3], 79, 0, "x", 4)
