"""Packed rows cut between documents on a CPU: the same attention, over fewer pairs."""

import random

import torch

from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.attention import check as rule
from transfusion.kernels.attention.torch_paths import cut, prepare_dense
from transfusion.kernels.testing import Layout, random_layout


def packed(rng: random.Random, length: int, most: int) -> Layout:
    """A row of documents of at most `most` tokens, each with an image, some hidden."""
    documents: list[int] = []
    images: list[tuple[int, int]] = []
    while sum(documents) < length:
        begun = sum(documents)
        documents.append(min(rng.randint(1, most), length - begun))
        if documents[-1] > 3:
            images.append((begun + 1, begun + rng.randint(2, documents[-1])))
    return Layout(length, images, documents, [i for i in range(len(images)) if rng.random() < 0.3])


def test_cut_rows_are_the_same_attention() -> None:
    """Documents of very different lengths, a row of one document beside them; gradients too."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    masks = [packed(rng, 160, 70).mask(), IntervalMask.causal(160)]
    mask = IntervalMask.stack([*masks, *(packed(rng, 160, 30).mask() for _ in range(6))])
    pieces = cut(mask)
    assert pieces is not None and len(pieces.groups) > 1
    case = rule.make_case(mask, torch.float32, torch.Generator().manual_seed(seed), heads=(2, 1))
    leaves = [t.clone().requires_grad_() for t in case[:3]]
    out = transfusion_attention(*leaves, mask, impl="sdpa")
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    silent = case._replace(grad_lse=torch.zeros_like(case.grad_lse))
    results = [out.detach(), case.grad_lse.float(), *grads]
    verdicts = rule.verdicts(silent, results)
    assert all(verdicts[name].passed for name in ("out", "dq", "dk", "dv")), verdicts


def test_every_visible_pair_is_in_one_piece() -> None:
    for seed in range(20):
        mask = IntervalMask.stack([random_layout(random.Random(seed + row), 200).mask() for row in range(2)])
        pieces = cut(mask)
        if pieces is None:
            continue
        found = torch.zeros_like(mask.to_dense())
        for places, visible in pieces.groups:
            for place, pairs in zip(places.view(len(visible), -1), visible[:, 0], strict=True):
                query, key = pairs.nonzero().T
                found[place[query] // 200, place[query] % 200, place[key] % 200] = True
        itself = torch.eye(200, dtype=torch.bool)  # padding is a token that sees itself
        assert torch.equal(found | itself, mask.to_dense() | itself)


def test_what_saves_little_is_left_whole() -> None:
    assert cut(IntervalMask.causal(300)) is None
    assert cut(IntervalMask.full(40, 60)) is None
    assert cut(IntervalMask.sliding_window(300, 20)) is None, "no document ends"
    assert cut(Layout(300, [], [200, 100]).mask()) is None
    assert cut(Layout(300, [], [30] * 10).mask()) is not None


def test_one_mask_row_for_a_batch_is_not_cut() -> None:
    mask = Layout(300, [], [30] * 10).mask()
    q = torch.randn(2, 1, 300, 16)
    out = transfusion_attention(q, q, q, mask, impl="sdpa")
    assert out.isfinite().all()
    assert "pieces" not in mask._derived


def test_where_all_is_seen_there_is_no_mask() -> None:
    """A fast path of its own; that of few queries over a cache cut at what is used is all seen too."""
    lengths = torch.tensor([5, 5])
    for mask in (
        IntervalMask.full(3, 7),
        IntervalMask.continuation(IntervalMask.causal(1), lengths, 6),
        IntervalMask.continuation(IntervalMask.full(4, 4), lengths, 9),
    ):
        assert prepare_dense(mask) is None
    for mask in (
        IntervalMask.causal(2),
        IntervalMask.continuation(IntervalMask.causal(1), lengths, 7),
        IntervalMask.continuation(IntervalMask.causal(1), torch.tensor([5, 4]), 6),
    ):
        visible = prepare_dense(mask)
        assert visible is not None and torch.equal(visible[:, 0], mask.to_dense())
