"""Packed rows cut between documents on a CPU: the same attention, over fewer pairs."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from transfusion.kernels import IntervalMask, prepare_attention, transfusion_attention
from transfusion.kernels.attention import check as rule
from transfusion.kernels.attention.torch_paths import cut, prepare_dense
from transfusion.kernels.testing import Layout, judge, random_layout


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


def judge_sdpa(case: rule.Case) -> None:
    """`sdpa` of it keeps its bounds, the gradients' too."""
    leaves = [t.clone().requires_grad_() for t in case[:3]]
    out = transfusion_attention(*leaves, case.mask, impl="sdpa")
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    silent = case._replace(grad_lse=torch.zeros_like(case.grad_lse))
    results = [out.detach(), case.grad_lse.float(), *grads]
    verdicts = rule.verdicts(silent, results)
    assert all(verdicts[name].passed for name in ("out", "dq", "dk", "dv")), verdicts


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
    judge_sdpa(case)


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


@pytest.mark.parametrize("batch", [1, 3])
def test_one_mask_row_is_cut_for_the_whole_batch(batch: int) -> None:
    """Grouped heads and gradients too."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    mask = packed(random.Random(seed), 300, 60).mask()
    case = rule.make_case(mask, torch.float32, torch.Generator().manual_seed(seed), heads=(4, 2), batch=batch)
    judge_sdpa(case)
    assert "pieces" in mask._derived and "dense" not in mask._derived


def test_no_batch_under_one_mask_row() -> None:
    q = torch.randn(0, 2, 300, 16, requires_grad=True)
    out = transfusion_attention(q, q, q, packed(random.Random(0), 300, 60).mask(), impl="sdpa")
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == grad.shape == q.shape


def layer(x: torch.Tensor, mask: IntervalMask, impl: str) -> torch.Tensor:
    return x + transfusion_attention(x, x, x, mask, impl=impl)


def with_gradient(
    run: Callable[..., torch.Tensor], x: torch.Tensor, mask: IntervalMask, impl: str
) -> list[torch.Tensor]:
    """What `run` gives, and the gradient of its squares."""
    leaf = x.clone().requires_grad_()
    out = run(leaf, mask, impl)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("prepared", ["not", "inside", "outside"])
def test_a_packed_mask_in_a_graph(checkpointed: bool, prepared: str) -> None:
    """Which layers share, made ready or not: one graph, in which nothing is kept with the mask."""
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def ready(mask: IntervalMask) -> None:
        prepare_attention(mask, dtype=torch.float32, batch=2, heads=2, kv_heads=2, head_dim=16)

    def layers(x: torch.Tensor, mask: IntervalMask, impl: str) -> torch.Tensor:
        if prepared == "inside":
            ready(mask)
        for _ in range(2):
            x = checkpoint(layer, x, mask, impl, use_reentrant=False) if checkpointed else layer(x, mask, impl)
        return x

    def eager(x: torch.Tensor, mask: IntervalMask, impl: str) -> torch.Tensor:
        return layer(layer(x, mask, impl), mask, impl)

    compiled = torch.compile(layers, backend=graphs, fullgraph=True)
    for seed in range(2):
        mask = IntervalMask.stack([packed(random.Random(seed + row), 96, 20).mask() for row in range(2)])
        if prepared == "outside":
            ready(mask)
        x = torch.randn(2, 2, 96, 16)
        gold = with_gradient(eager, x.double(), mask, "reference")
        orders = [with_gradient(eager, x, mask, impl) for impl in ("reference", "sdpa")]
        for _ in range(2):  # what the first call met of the mask is no other graph the second time
            for mine, exact, *rounded in zip(with_gradient(compiled, x, mask, "sdpa"), gold, *orders, strict=True):
                verdict = judge(mine, rounded, exact)
                assert verdict.passed, verdict
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


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_a_mask_without_readable_numbers_is_not_read() -> None:
    """Under vmap and functionalize, and in a trace of real tensors, where reading would raise or fix the numbers."""
    x, ids = torch.randn(2, 2, 24, 16), torch.full((2, 24), -1)
    ids[0, 3:9] = 0

    def attention(x: Tensor, ids: Tensor, impl: str = "sdpa") -> Tensor:
        return transfusion_attention(x, x, x, IntervalMask.from_ids(ids), impl=impl)

    mapped = torch.vmap(lambda x, ids: attention(x[None], ids[None])[0])(x, ids)
    made = (
        mapped,
        torch.func.functionalize(attention)(x, ids),
        make_fx(lambda x, ids: attention(x, ids))(x, ids)(x, ids),
    )
    for each in made:
        assert judge(each, attention(x, ids), attention(x.double(), ids, "reference")).passed
