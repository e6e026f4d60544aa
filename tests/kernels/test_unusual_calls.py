"""Calls that are legitimate and seldom made: overlapping inputs, traces, inference mode first, masks that travel."""

import pickle
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from transfusion.kernels import IntervalMask, RaggedLatents, interval_mask, registry, transfusion_attention, tuning
from transfusion.kernels.testing import poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAUSAL = IntervalMask.causal(24, DEVICE)


def overlapping(kind: str) -> Tensor:
    """(1, 3, 24, 16), last stride 1, to which torch makes an empty one like it with another last stride."""
    if kind == "one row for all":
        return torch.randn(3, 16, 1, device=DEVICE).permute(2, 0, 1)[:, :, None].expand(1, 3, 24, 16)
    return torch.randn(1, 3, 39, device=DEVICE).unfold(2, 16, 1)


@pytest.mark.parametrize("kind", ["one row for all", "windows"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("scale", [0.25, -0.3, 0.0])
def test_overlapping_inputs(kind: str, impl: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch.setattr)
    inputs = [overlapping(kind), *torch.randn(2, 1, 3, 24, 16, device=DEVICE)]
    above = torch.randn(1, 3, 24, 16, device=DEVICE)
    for turn in range(3):
        given = inputs[-turn:] + inputs[:-turn]  # as q, k and v

        def results(*given: Tensor) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in given]
            out = transfusion_attention(*leaves, CAUSAL, impl=impl, scale=scale)
            return [out.detach(), *torch.autograd.grad(out, leaves, above)]

        for found, wanted in zip(results(*given), results(*(t.contiguous() for t in given)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_trace_leaves_no_stand_ins_in_the_mask() -> None:
    q, k, v = torch.randn(3, 1, 2, 24, 16)
    wanted = transfusion_attention(q, k, v, IntervalMask.causal(24))
    for impl in ("auto", "reference"):
        mask = IntervalMask.causal(24)

        class Layer(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return transfusion_attention(q, k, v, mask, impl=impl)  # noqa: B023

        torch.export.export(Layer(), (q, k, v), strict=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(mask.to_dense(), FakeTensor)
        found = transfusion_attention(q, k, v, mask, impl=impl)
        assert not isinstance(found, FakeTensor)
        torch.testing.assert_close(found, wanted)


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 24, 16)
        assert transfusion_attention(q, q, q, IntervalMask.causal(24)).shape == q.shape
    for impl in ("auto", "reference"):
        q = torch.empty(1, 2, 24, 16, device="meta")
        assert transfusion_attention(q, q, q, IntervalMask.causal(24, "meta"), impl=impl).is_meta


def test_makers_of_fake_tensors() -> None:
    """The sizes that real ones have, for Python's numbers decide them."""

    def made() -> tuple[torch.Size, ...]:
        mask = IntervalMask.stack([IntervalMask.from_spans(30, [(2, 5), (9, 20)], [8, 22], hidden_images=[1])] * 2)
        ragged = RaggedLatents.pack([torch.randn(3, 4, 4), torch.randn(3, 40, 40)])
        tensors = mask.intervals, mask.to_block_mask(16).kv_indices, *ragged.layout[:2], ragged.values
        assert all(isinstance(t, FakeTensor) == interval_mask.is_traced() for t in tensors)
        return tuple(t.shape for t in tensors)

    with FakeTensorMode():
        stand_ins = made()
    assert stand_ins == made()


def test_a_graph_of_symbolic_sizes() -> None:
    compiled = torch.compile(transfusion_attention, backend="eager", dynamic=True, fullgraph=True)
    for heads, length in ((2, 24), (4, 31)):
        q, k, v = (torch.randn(1, h, length, 16) for h in (heads, 2, 2))
        mask = IntervalMask.causal(length)
        torch.testing.assert_close(compiled(q, k, v, mask), transfusion_attention(q, k, v, mask))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_export_has_any_batch(impl: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return transfusion_attention(q, q, q, mask, impl=impl)

    mask = IntervalMask.from_spans(6, [(1, 4)])
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(Module(), (torch.randn(2, 2, 6, 16),), dynamic_shapes=({0: batch},)).module()
    q = torch.randn(5, 2, 6, 16)
    torch.testing.assert_close(exported(q), Module()(q))


def test_a_mask_seen_in_inference_mode_first_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the forward and the backward share its tiles, as they do in a GPU's table."""
    mask, leaves = IntervalMask.causal(24, DEVICE), list(torch.randn(3, 1, 2, 24, 64, device=DEVICE).unbind())
    table, dtype = tuning.table_name(leaves[0].device), torch.float32
    before = tuning.launch("attention", "backward_query", table, dtype, 64)
    forward = tuning.launch("attention", "forward", table, dtype, 64)
    tuning.set_launch("attention", "backward_query", table, dtype, 64, forward)
    try:
        with torch.inference_mode():
            transfusion_attention(*leaves, mask, impl="triton")
        q, k, v = (t.requires_grad_() for t in leaves)
        transfusion_attention(q, k, v, mask, impl="triton").sum().backward()
    finally:
        tuning.set_launch("attention", "backward_query", table, dtype, 64, before)


@pytest.mark.parametrize("impl", ["triton", "reference", "sdpa"])
def test_a_mask_made_in_inference_mode_trains(impl: str) -> None:
    with torch.inference_mode():
        mask = IntervalMask.causal(24, DEVICE)
        mask.query_tiles(16, 16)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 24, 16, device=DEVICE).unbind())
    transfusion_attention(q, k, v, mask, impl=impl).sum().backward()
    assert q.grad is not None


def test_one_graph_for_all_lengths() -> None:
    def attended(q: Tensor, ids: Tensor) -> Tensor:
        return transfusion_attention(q, q, q, IntervalMask.from_ids(ids))

    def stacked(q: Tensor, ids: Tensor) -> Tensor:  # symbolic sizes of q, a mask of as many rows
        return transfusion_attention(q, q, q, IntervalMask.stack([IntervalMask.causal(q.shape[2])] * 2))

    for function in (attended, stacked):
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
        for length in range(40, 130, 10):
            q, ids = torch.randn(2, 2, length, 16), torch.full((2, length), -1)
            torch.testing.assert_close(compiled(q, ids), function(q, ids))
        assert counter.frame_count == 1


def test_no_number_stays_in_its_piece() -> None:
    """Also where documents of a batch go through together, some of them padded; short ones are one piece."""
    mask = IntervalMask.stack([IntervalMask.from_spans(192, documents=[40, 60, 92], device=DEVICE)] * 2)
    q, k, v = torch.randn(3, 2, 2, 192, 16, device=DEVICE).unbind()
    broken = torch.zeros(192, dtype=torch.bool, device=DEVICE)
    broken[:40] = True
    for tensor in (k, v):
        inputs = [q, k.clone(), v.clone()]
        inputs[1 if tensor is k else 2][0, :, 0, 0] = torch.nan
        leaves = [t.requires_grad_() for t in inputs]
        out = transfusion_attention(*leaves, mask, impl="sdpa")
        grads = torch.autograd.grad(out.sum(), leaves)
        for result in (out, *grads):
            assert not result[1].isnan().any() and not result[0, :, ~broken].isnan().any()
        assert out[0, :, broken].isnan().any()


def test_no_rows_at_all() -> None:
    nothing = torch.zeros(0, 24, dtype=torch.int32, device=DEVICE)
    q = torch.randn(0, 2, 24, 16, device=DEVICE)
    for impl in ("triton", "reference", "sdpa"):
        assert transfusion_attention(q, q, q, IntervalMask(nothing, nothing + 1, 24), impl=impl).shape == q.shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_stand_ins_of_a_gpu_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TRITON_INTERPRET", False)
    assert registry.triton_reasons(device=torch.device("cuda:0"), dtype=torch.float16) == []


def test_autocast_casts_what_torch_would() -> None:
    whole = torch.zeros(1, 2, 24, 16, dtype=torch.int64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        with pytest.raises(TypeError, match=r"q must be floating point of 16, 32 or 64 bits, got torch\.int64"):
            transfusion_attention(whole, whole, whole, CAUSAL)
        precise = whole.double()
        assert transfusion_attention(precise, precise, precise, CAUSAL, impl="sdpa").dtype == torch.float64


def test_eight_bits_are_too_few() -> None:
    narrow = torch.zeros(1, 2, 24, 16, device=DEVICE).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"q must be floating point of 16, 32 or 64 bits, got torch\.float8_e4m3fn"):
        transfusion_attention(narrow, narrow, narrow, CAUSAL)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": "x"}, TypeError, "scale='x' must be a number, got str"),
        ({"scale": torch.tensor(0.3)}, TypeError, "scale must be a number; a Tensor would get no gradient"),
        ({"dim": 0}, ValueError, "has no head dimension"),
        ({"impl": "flex", "dtype": torch.float64}, RuntimeError, "FlexAttention takes no float64"),
        ({"impl": "flex", "leaf": True}, RuntimeError, "FlexAttention has no backward on a CPU"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict, error: type[Exception], message: str) -> None:
    if arguments.get("leaf") and DEVICE != "cpu":
        pytest.skip("it has one there")
    given = {"dim": 16, "dtype": torch.float32, "leaf": False} | arguments
    dim, dtype, leaf = (given.pop(name) for name in ("dim", "dtype", "leaf"))
    q = torch.zeros(1, 2, 24, dim, dtype=dtype, device=DEVICE, requires_grad=leaf)
    with pytest.raises(error, match=message):
        transfusion_attention(q, q, q, CAUSAL, **given)


def test_what_a_graph_will_compute_is_kept_by_its_own_masks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that is played here: nothing is computed in one, so a mask from outside must not keep what it makes."""
    outside = IntervalMask.causal(24)
    monkeypatch.setattr(interval_mask, "_is_capturing", lambda tensor: True)
    inside = IntervalMask.causal(24)
    assert outside.once("a", list) is not outside.once("a", list)
    assert inside.once("a", list) is inside.once("a", list)
    monkeypatch.undo()
    assert outside.once("a", list) is outside.once("a", list)


def test_nan_is_told_from_nothing_seen() -> None:
    q, k, v = torch.randn(3, 1, 1, 24, 16, device=DEVICE).unbind()
    q[0, 0, 2] = torch.nan
    mask = IntervalMask(CAUSAL.query_start + 1, CAUSAL.query_end, 24)  # the first query sees nothing
    for impl in ("triton", "reference"):
        _, lse = transfusion_attention(q, k, v, mask, impl=impl, return_lse=True)
        assert lse[0, 0, 0].isneginf() and lse[0, 0, 2].isnan() and lse[0, 0, 3:].isfinite().all()


def test_a_window_without_an_end_is_causal() -> None:
    for window in (24, 2**31, sys.maxsize):
        assert torch.equal(IntervalMask.sliding_window(24, window).intervals, IntervalMask.causal(24).intervals)


def test_a_mask_travels_light() -> None:
    mask = IntervalMask.causal(500)
    mask.once("block_mask", mask.to_block_mask)
    dense = mask.to_dense()
    packed = pickle.dumps(mask)
    assert len(packed) < 20_000
    assert torch.equal(pickle.loads(packed).to_dense(), dense)


def test_hosts_numbers_are_made_on_the_host() -> None:
    with torch.device("meta"):
        mask = IntervalMask.from_spans(40, [(4, 20)], [25, 15], device="cpu")
        latents = RaggedLatents(torch.zeros(60, device="cpu"), 3, [(4, 5)])
        assert IntervalMask.from_spans(40).device.type == "meta"
    assert mask.device.type == "cpu" and latents.layout.tiles.device.type == "cpu"


def test_ragged_latents_of_any_whole_number() -> None:
    with pytest.raises(TypeError, match="float"):
        RaggedLatents(torch.zeros(180), 3, [(7.5, 8)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        RaggedLatents(torch.zeros(60), 3, [(4, 5)]).with_values(torch.zeros(60, dtype=torch.int64))
    assert RaggedLatents(torch.zeros(60), np.int64(3), [(np.int64(4), 5)]).channels == 3
    with pytest.raises(TypeError, match=r"of one dtype, got torch\.float16 and torch\.float32"):
        RaggedLatents.pack([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.float16)])
    with pytest.raises(ValueError, match="must be"):
        RaggedLatents.pack([torch.tensor(1.0)])
