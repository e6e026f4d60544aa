"""Packed rows cut between documents on a CPU: the same attention, over fewer pairs."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from transfusion.kernels import IntervalMask, prepare_attention, transfusion_attention
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


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_one_mask_row_is_cut_for_the_whole_batch(batch: int) -> None:
    """Grouped heads and gradients too."""
    mask = packed(random.Random(batch), 300, 60).mask()
    leaves = [torch.randn(batch, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2)]
    grad_out = torch.randn(batch, 4, 300, 16)
    out = transfusion_attention(*leaves, mask, impl="sdpa")
    grads = torch.autograd.grad(out, leaves, grad_out)
    assert batch == 0 or "dense" not in mask._derived
    rows = IntervalMask.stack([packed(random.Random(batch), 300, 60).mask()] * batch) if batch else mask
    whole = transfusion_attention(*leaves, rows, impl="sdpa")
    for mine, its in zip((out, *grads), (whole, *torch.autograd.grad(whole, leaves, grad_out)), strict=True):
        assert mine.shape == its.shape and torch.allclose(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("prepared", ["not", "inside", "outside"])
def test_a_packed_mask_in_a_graph(checkpointed: bool, prepared: str) -> None:
    """Which layers share, made ready or not: one graph, in which nothing is kept with the mask."""
    shape, graphs = (2, 2, 96, 16), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def ready(mask: IntervalMask) -> None:
        prepare_attention(mask, dtype=torch.float32, batch=2, heads=2, kv_heads=2, head_dim=16)

    def layer(x: torch.Tensor, mask: IntervalMask) -> torch.Tensor:
        return x + transfusion_attention(x, x, x, mask, impl="sdpa")

    def layers(x: torch.Tensor, mask: IntervalMask) -> torch.Tensor:
        if prepared == "inside":
            ready(mask)
        for _ in range(2):
            x = checkpoint(layer, x, mask, use_reentrant=False) if checkpointed else layer(x, mask)
        return x

    compiled = torch.compile(layers, backend=graphs, fullgraph=True)
    for seed in range(2):
        mask = IntervalMask.stack([packed(random.Random(seed + row), 96, 20).mask() for row in range(2)])
        if prepared == "outside":
            ready(mask)
        x = torch.randn(shape, requires_grad=True)
        out = compiled(x, mask)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        eager = layer(layer(x, mask), mask)
        assert torch.allclose(out, eager, rtol=1e-5, atol=1e-5)
        assert torch.allclose(grad, torch.autograd.grad(eager.square().sum(), x)[0], rtol=1e-4, atol=1e-4)
        compiled(x, mask)
    assert graphs.frame_count == 1


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
