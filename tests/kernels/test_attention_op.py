"""transfusion_attention as an op of PyTorch: opcheck, compile, checkpointing, autocast, transforms, FlexAttention."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transfusion.kernels import IntervalMask, prepare_attention, transfusion_attention, tuning
from transfusion.kernels.attention import check as rule
from transfusion.kernels.attention import op, torch_paths
from transfusion.kernels.attention.check import Case
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.testing import LAYOUTS, random_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (21, 150, 70, 30, 97, 33) if DEVICE == "cpu" else (70, 171, 83, 197, 127, 250)  # astride the forward's tile


def make_case(mask: IntervalMask, **shape: Any) -> Case:
    seed = random.randrange(2**32)
    print(f"input seed {seed}")
    return rule.make_case(mask.to(DEVICE), torch.float32, torch.Generator().manual_seed(seed), **shape)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_opcheck(impl: str) -> None:
    case = make_case(LAYOUTS["adjacent_images"].mask())
    calls: list[tuple] = []  # type: ignore[type-arg]
    original = torch.ops.transfusion.attention.default

    class Recorder:
        def __call__(self, *args: object) -> object:
            calls.append(args)
            return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_attention", Recorder())
        leaves = [t.clone().requires_grad_() for t in case[:3]]
        transfusion_attention(*leaves, case.mask, impl=impl)  # a call without gradients makes no tiles for backward
    arguments = [t.requires_grad_() if i < 3 else t for i, t in enumerate(calls[0])]
    torch.library.opcheck(original, tuple(arguments))
    out, lse = (t.detach() for t in original(*arguments))
    saved = [case.grad_out, case.grad_lse, *case[:3], out, lse, arguments[3], *arguments[5:]]
    torch.library.opcheck(
        torch.ops.transfusion.attention_backward.default,
        tuple(t.detach() if isinstance(t, Tensor) else t for t in saved),
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_at_most_two_graphs_over_lengths_and_masks(grouped: bool) -> None:
    """One graph for the first length, one for any: the tiles of a new mask are a node of the graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def two_layers(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
        mask = IntervalMask(start, end, q.shape[2])
        hidden = transfusion_attention(q, k, v, mask, impl="triton")
        return transfusion_attention(hidden, k, v, mask, impl="triton")

    for length in LENGTHS:
        case = make_case(random_layout(random.Random(length), length).mask(), heads=(2, 1) if grouped else (1, 1))
        q = case.q.requires_grad_()
        eager = transfusion_attention(q, case.k, case.v, case.mask, impl="triton")
        expected = transfusion_attention(eager, case.k, case.v, case.mask, impl="triton")
        actual = two_layers(q, case.k, case.v, case.mask.query_start, case.mask.query_end)
        assert torch.equal(actual, expected)
        assert all(map(torch.equal, *(torch.autograd.grad(x.sum(), q) for x in (actual, expected))))
    assert counter.frame_count <= 2


def test_a_mask_made_outside_the_graph() -> None:
    """As the model uses it: a new mask comes with each batch, and its tiles stay with it from layer to layer."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def two_layers(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
        hidden = transfusion_attention(q, k, v, mask, impl="triton")
        return transfusion_attention(hidden, k, v, mask, impl="triton")

    for length in LENGTHS:
        case = make_case(random_layout(random.Random(length), length).mask())
        q = case.q.requires_grad_()
        fresh = IntervalMask(case.mask.query_start, case.mask.query_end, length)
        actual = two_layers(q, case.k, case.v, fresh)
        assert fresh._derived, "the tiles stay with the mask"
        hidden = transfusion_attention(q, case.k, case.v, case.mask, impl="triton")
        assert torch.equal(actual, transfusion_attention(hidden, case.k, case.v, case.mask, impl="triton"))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("keep", [True, False])
def test_selective_checkpointing_keeps_the_output(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the op's outputs kept, backward runs no second forward; gradients are the same to the last bit."""
    case = make_case(LAYOUTS["adjacent_images"].mask())
    calls = []
    from transfusion.kernels.attention import kernel

    original = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *call: (calls.append(1), original(*call))[1])

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = keep and function == torch.ops.transfusion.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return transfusion_attention(q * 2, k, v, case.mask, impl="triton").sin()

    leaves = [t.clone().requires_grad_() for t in case[:3]]
    expected = torch.autograd.grad(block(*leaves).sum(), leaves)
    calls.clear()
    out = checkpoint(
        block, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(map(torch.equal, grads, expected))
    assert len(calls) == (1 if keep else 2)


def test_forward_mode_is_refused() -> None:
    case = make_case(LAYOUTS["text_only"].mask())
    for impl in ("auto", "reference", "triton"):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda q, impl=impl: transfusion_attention(q, *case[1:4], impl=impl), (case.q,), (case.q,))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_vmap_is_refused(impl: str) -> None:
    case = make_case(LAYOUTS["text_only"].mask())
    with pytest.raises(NotImplementedError, match=r"no batching rule for torch\.vmap"):
        torch.vmap(lambda q: transfusion_attention(q, *case[1:4], impl=impl))(torch.stack([case.q, case.q]))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_vmap_over_the_backward_alone_is_refused(impl: str) -> None:
    case = make_case(LAYOUTS["text_only"].mask())
    leaves = [t.requires_grad_() for t in case[:3]]
    out = transfusion_attention(*leaves, case.mask, impl=impl)  # type: ignore[call-overload]
    with pytest.raises(NotImplementedError, match=r"no batching rule for torch\.vmap"):
        torch.vmap(lambda above: torch.autograd.grad(out, leaves, above))(torch.stack([case.grad_out] * 2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_pytorchs_own_attention() -> None:
    case = make_case(LAYOUTS["text_only"].mask())
    both = torch.stack([case.q, case.q + 1])
    mapped = torch.vmap(lambda q: transfusion_attention(q, *case[1:4], impl="sdpa"))(both)
    for out, q in zip(mapped, both, strict=True):
        torch.testing.assert_close(out, transfusion_attention(q, *case[1:4], impl="sdpa"))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    case = make_case(LAYOUTS["text_only"].mask())
    call = {"q": case.q, "k": case.k, "v": case.v}
    call[name] = call[name].cpu().numpy()
    with pytest.raises(TypeError, match=rf"{name} must be a tensor \(B, H, N, D\), got numpy.ndarray"):
        transfusion_attention(**call, mask=case.mask)


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as it is, where nothing of what its compiler does is asked."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(torch_paths, "_compiled_flex", lambda: flex_attention)


@pytest.mark.usefixtures("eager_flex")
@pytest.mark.parametrize("impl", ["triton", "reference", "sdpa", "flex"])
def test_autocast_casts_to_its_dtype(impl: str) -> None:
    """Of mixed inputs too; gradients come back in each input's own dtype."""
    case, trains = make_case(LAYOUTS["text_only"].mask()), impl != "flex"  # which has no backward on a CPU
    dtype = torch.float16 if impl == "triton" and TRITON_INTERPRET else torch.bfloat16
    leaves = [t.clone().requires_grad_(trains) for t in (case.q, case.k.bfloat16(), case.v)]
    with torch.autocast(DEVICE, dtype):
        out = transfusion_attention(*leaves, case.mask, impl=impl)
    assert out.dtype == dtype
    assert torch.equal(out, transfusion_attention(*(t.to(dtype) for t in leaves), case.mask, impl=impl))
    if trains:
        grads = torch.autograd.grad(out.sum(), leaves)
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]


@pytest.mark.usefixtures("eager_flex")
@pytest.mark.parametrize("impl", ["triton", "sdpa", "flex"])
@pytest.mark.parametrize("cast", [None, torch.float16], ids=str)
def test_a_call_makes_nothing_that_was_prepared(
    impl: str, cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast of its dtype, whose launches are others here; float64 stays what it is, which neither takes."""
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    for stage in ("forward", "decode", "backward_query", "backward_key"):
        table = tuning.table_name(torch.device(DEVICE))
        tuning.set_launch("attention", stage, table, torch.float16, 16, tuning.Launch(16, 16, 4, 1))
    case, trains = make_case(LAYOUTS["adjacent_images"].mask()), impl == "triton"
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "needs_grad": trains, "impl": impl}
    with torch.autocast(DEVICE, cast, enabled=cast is not None):
        prepare_attention(case.mask, dtype=torch.float32, **sizes)
        prepared = set(case.mask._derived)
        transfusion_attention(*(t.requires_grad_(trains) for t in case[:3]), case.mask, impl=impl)
        assert prepared == set(case.mask._derived) and prepared
        if impl != "sdpa":
            with pytest.raises(RuntimeError, match="float64"):
                prepare_attention(case.mask, dtype=torch.float64, **sizes)


@pytest.mark.usefixtures("eager_flex")
def test_flex_is_the_same_attention() -> None:
    """FlexAttention under `to_block_mask`, grouped heads and a batch."""
    masks = [random_layout(random.Random(seed), 300).mask() for seed in range(2)]
    case = make_case(IntervalMask.stack(masks), heads=(4, 2))
    out = transfusion_attention(*case[:4], impl="flex")
    gold = rule.formula(case, torch.float64, torch.float64)[0]
    verdict = rule.judge(out, rule.eager_orders(case, 8)[0], gold)
    assert verdict.passed, verdict


def test_compiled_flex_is_the_same_attention() -> None:
    """On a CPU too: another scale, one mask row for a batch, grouped heads, queries that see nothing.

    scale·(q·k) = (2·q)·k / √D at scale = 2 / √D: the formula, of queries times a power of two, exactly.
    """
    start, end = torch.randint(10, 150, (2, 1, 150))
    case = make_case(IntervalMask(start, end, 150), heads=(4, 2), batch=2)
    out = transfusion_attention(*case[:4], scale=0.5, impl="flex")
    scaled = case._replace(q=2 * case.q)
    gold = rule.formula(scaled, torch.float64, torch.float64)[0]
    verdict = rule.judge(out, rule.eager_orders(scaled, 8)[0], gold)
    assert verdict.passed and not out[:, :, :10].any(), verdict
