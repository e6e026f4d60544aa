"""What cannot be a mask, a ragged buffer or a call of attention is refused by its name and value, not deep in torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from transfusion.kernels import IntervalMask, RaggedLatents, prepare_attention, transfusion_attention

CAUSAL = IntervalMask.causal(24)
ZERO = torch.zeros(1, dtype=torch.int64)
IDS = torch.zeros(1, 2, dtype=torch.int64)
QUERY = torch.zeros(1, 2, 24, 16)


def prepare(mask: Any = CAUSAL, **changes: Any) -> None:
    given = {"dtype": torch.float32, "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 16} | changes
    prepare_attention(mask, **given)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IntervalMask.full(2**31, 3), ValueError, "2147483648 queries are too many"),
        (lambda: IntervalMask.from_ids(torch.zeros(2, 0, dtype=torch.int64)), ValueError, "hold no token"),
        (
            lambda: IntervalMask.from_ids(*[torch.zeros(1, 4, dtype=torch.int64)] * 3),
            TypeError,
            r"hidden must be .* of bools, .*, got torch\.int64",
        ),
        (
            lambda: IntervalMask.continuation(IntervalMask.stack([CAUSAL] * 2), torch.zeros(3, dtype=torch.int64), 50),
            ValueError,
            "3 prefix_lengths for a mask of 2 rows",
        ),
        (
            lambda: IntervalMask.continuation(CAUSAL, torch.zeros(3, dtype=torch.bool), 50),
            TypeError,
            r"prefix_lengths must be .* of integers, got torch\.bool",
        ),
        (
            lambda: IntervalMask.continuation(IntervalMask.causal(5), ZERO, 3),
            ValueError,
            "num_keys=3 has no room for 5 new tokens",
        ),
        (lambda: IntervalMask.continuation(IntervalMask.full(2, 3), ZERO, 9), ValueError, "as many keys as queries"),
        (
            lambda: IntervalMask.continuation(IntervalMask.causal(2), ZERO, 9.0),
            TypeError,
            "num_keys=9.0 must be a whole number",
        ),
        (lambda: IntervalMask.continuation(CAUSAL, ZERO.to("meta"), 50), ValueError, "on meta, the mask on"),
        (lambda: IntervalMask.prefix_lm(5, 2.5), TypeError, "prefix=2.5 must be a whole number, got float"),
        (lambda: IntervalMask.sliding_window(5, 2.5), TypeError, "window=2.5 must be a whole number"),
        (lambda: IntervalMask.causal(2.5), TypeError, "length=2.5 must be a whole number"),
        (lambda: IntervalMask.causal(-3), ValueError, "length=-3 must be at least 0"),
        (lambda: IntervalMask.full(3, -1), ValueError, "num_keys=-1 must be at least 0"),
        (lambda: IntervalMask.from_spans(5.0), TypeError, r"length=5\.0 must be a whole number"),
        (
            lambda: IntervalMask.from_spans(5, documents=[2.5, 2.5]),
            TypeError,
            r"a document's length=2\.5 must be a whole number",
        ),
        (lambda: IntervalMask.from_spans(5, images=(1, 3)), TypeError, r"images must be pairs .* got 1"),
        (lambda: IntervalMask.from_spans(5, [(1,)]), TypeError, r"images must be pairs .* got \(1,\)"),
        (lambda: IntervalMask(ZERO[None], ZERO[None], 5.0), TypeError, r"num_queries=5\.0 must be a whole number"),
        (lambda: IntervalMask.from_ids(ZERO), ValueError, r"image_ids must be \(B, N\), got \(1,\); one row is"),
        (lambda: IntervalMask.from_ids(ZERO[None], ZERO[None].to("meta")), ValueError, "document_ids is on meta"),
        (lambda: IntervalMask.stack([CAUSAL, CAUSAL.to("meta")]), ValueError, r"on one device, got \[.*'meta'\]"),
        (lambda: IntervalMask.continuation(None, ZERO, 50), TypeError, "new must be an IntervalMask, got NoneType"),
        (
            lambda: IntervalMask.continuation(CAUSAL, ZERO.to(torch.uint32), 50),
            TypeError,
            r"prefix_lengths must be .* of integers, got torch\.uint32",
        ),
        (
            lambda: IntervalMask.continuation(IntervalMask.causal(1), ZERO.to(torch.complex64), 50),
            TypeError,
            r"prefix_lengths must be .* of integers, got torch\.complex64",
        ),
        (lambda: IntervalMask.from_ids(IDS, [[0, 0]]), TypeError, r"document_ids must be a tensor .*, got list"),
        (lambda: IntervalMask.from_ids(IDS, hidden=[[0, 0]]), TypeError, r"hidden must be a tensor .*, got list"),
        (lambda: IntervalMask.stack([CAUSAL, None]), TypeError, "each of masks must be an IntervalMask, got NoneType"),
        (lambda: CAUSAL.query_tiles(0, 16), ValueError, "block_q=0 must be at least 1"),
        (lambda: CAUSAL.query_tiles(16.0, 16), TypeError, r"block_q=16\.0 must be a whole number, got float"),
        (lambda: CAUSAL.key_tiles(16, -4), ValueError, "block_q=-4 must be at least 1"),
        (lambda: CAUSAL.to_block_mask(0), ValueError, "block_size=0 must be at least 1"),
        (lambda: RaggedLatents([1.0], 1, [(1, 1)]), TypeError, "values must be a tensor of all elements.*, got list"),
        (lambda: RaggedLatents(None, 1, [(1, 1)]), TypeError, "values must be a tensor .*, got NoneType"),
        (lambda: RaggedLatents(torch.zeros(2), 1, (1, 2)), TypeError, r"sizes must be pairs .*, got 1$"),
        (lambda: RaggedLatents(torch.zeros(2), 1.5, [(1, 2)]), TypeError, r"channels=1\.5 must be a whole number"),
        (lambda: prepare(heads=4, kv_heads=3), ValueError, "4 query heads are not a multiple of 3 key heads"),
        (lambda: prepare(kv_heads=0), ValueError, "not a multiple of 0 key heads"),
        (lambda: prepare(dtype=torch.int32), TypeError, r"q must be floating point of .* bits, got torch\.int32"),
        (lambda: prepare(head_dim=0), ValueError, "head_dim=0"),
        (lambda: prepare(mask=None), TypeError, "mask must be an IntervalMask, got NoneType"),
        (lambda: prepare(mask=IntervalMask.stack([CAUSAL] * 2), batch=3), ValueError, "2 rows for a batch of 3"),
        (
            lambda: transfusion_attention(QUERY, QUERY, QUERY, CAUSAL, impl=["sdpa"]),
            ValueError,
            r"impl=\['sdpa'\] is unknown; choose one of 'auto'",
        ),
    ],
)
def test_is_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
