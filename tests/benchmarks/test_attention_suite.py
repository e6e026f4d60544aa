"""Cases, baselines and the check before the clock."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks import attention, baselines, cases, gate, libraries
from benchmarks.adapter import Baseline
from benchmarks.cases import AttentionCase
from benchmarks.clock import Effort
from transfusion.kernels import IntervalMask
from transfusion.kernels.attention import torch_paths
from transfusion.kernels.testing import LAYOUTS, random_layout

OFF = 1.01 if attention.DTYPE.itemsize == 4 else 1.2  # more than 16 bits may be off
CASE = AttentionCase("a", "packed", 2, 96, 96, 4, 2, 16, 16)
ONCE = Effort(0.0, 1, 1)


class Wrong(Baseline):
    """Right but for one thing."""

    def __init__(self, change):
        super().__init__("wrong", "reference", ours=True)
        self.change = change

    def __call__(self, prepared, q, k, v):
        return self.change(super().__call__(prepared, q, k, v), q, k, v)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * OFF


FAULTS = {
    "scaled": lambda out, q, k, v: out * OFF,
    "no mask": lambda out, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "NaN": lambda out, q, k, v: out.index_fill(2, torch.tensor(7, device=out.device), torch.nan),
    "gradient": lambda out, q, k, v: WrongGradient.apply(out),
}


@pytest.fixture
def suite(monkeypatch):
    """One small case, and the baselines that a test wants."""

    def use(*chosen):
        monkeypatch.setattr(attention, "ATTENTION", {"small": CASE})
        monkeypatch.setattr(attention, "BASELINES", {each.name: each for each in chosen})

    return use


@pytest.mark.parametrize("cases_of", [cases._CPU, cases._CUDA], ids=["cpu", "cuda"])
def test_every_case_has_a_mask_of_its_shape(cases_of):
    for name, case in cases_of.items():
        mask = case.mask()
        assert (mask.num_queries, mask.num_keys) == (case.queries, case.keys), name
        assert mask.batch_size in (1, case.batch), name
        assert case.heads % case.kv_heads == 0, name
        assert mask.area().min() > 0, name
        assert torch.equal(mask.query_start, case.mask().query_start), name


def test_a_cache_has_rows_of_different_lengths():
    mask = AttentionCase("f", "continuation", 8, 4, 204, 2, 1, 16, backward=False).mask()
    lengths = (mask.query_end > mask.query_start).sum(1)
    assert len(lengths.unique()) > 1
    assert torch.equal(mask.area(), lengths * 4)  # the new tokens are an image: each sees all of them


def test_a_right_baseline_is_timed_and_its_row_says_all(suite):
    suite(baselines.Ours())
    rows = list(attention.run("small", "ours", ONCE))
    assert [(row["measure"], row["status"]) for row in rows] == [
        ("forward", "ok"),
        ("backward", "ok"),
        ("prepare", "ok"),
    ], rows
    forward, backward, prepare = rows
    area = int(CASE.mask().area().sum())
    for row, factor in ((forward, 4), (backward, 10)):
        assert row["tflops"] == pytest.approx(factor * area * CASE.heads * CASE.head_dim / row["p50"] / 1e12)
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["share"] > 0
    assert prepare["tokens"] == CASE.batch * CASE.queries
    for name in ("machine", "torch", "triton", "python", "commit", "dirty", "date", "dtype", "first_call", "gate_seed"):
        assert name in forward, name


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_baseline_is_never_timed(suite, monkeypatch, fault):
    suite(Wrong(FAULTS[fault]))
    monkeypatch.setattr(attention, "device_time", lambda *_: pytest.fail("timed"))
    (row,) = attention.run("small", "wrong", ONCE)
    assert row["status"] == "failed"
    assert "above its bound" in row["reason"]


def test_the_check_finds_a_fault_in_any_slice():
    seed = random.randrange(1000)
    (leaves,) = attention.inputs(CASE, copies=1)
    mask = CASE.mask(attention.DEVICE)
    for baseline in (baselines.Eager(), baselines.Ours()):
        assert not gate.failures(gate.verdicts(baseline, mask, mask, leaves, True, seed)), seed
    for name, fault in FAULTS.items():
        assert gate.failures(gate.verdicts(Wrong(fault), mask, mask, leaves, True, seed)), (name, seed)


def test_a_crash_of_ours_fails_and_of_a_library_is_skipped(suite):
    def crash(*_):
        raise RuntimeError("no such kernel\nand more")

    ours, theirs = Wrong(crash), Wrong(crash)
    theirs.name, theirs.ours = "library", False
    suite(ours, theirs)
    assert [row["status"] for row in attention.run("small", "wrong", ONCE)] == ["failed"]
    (row,) = attention.run("small", "library", ONCE)
    assert (row["status"], row["reason"]) == ("skipped", "RuntimeError: no such kernel")


def test_what_cannot_run_here_says_why(suite):
    unable = [each for each in baselines.BASELINES.values() if each.why_not(CASE)]
    suite(*unable)
    for baseline in unable:
        (row,) = attention.run("small", baseline.name, ONCE)
        assert row["status"] == "skipped"
        assert len(row["reason"]) > 10


def test_scores_that_do_not_fit_are_not_tried():
    huge = replace(CASE, queries=1 << 20, keys=1 << 20)
    assert "GiB" in baselines.Eager().why_not(huge)
    assert baselines.Eager().why_not(CASE) is None


def test_the_dense_mask_over_grouped_heads_is_for_a_fused_path(monkeypatch):
    heads = []
    monkeypatch.setattr(torch_paths, "dense_sdpa", lambda q, k, v, mask, scale: heads.append(k.shape[1]) or q)
    baseline, mask = baselines.DenseSdpa(), IntervalMask.causal(8)
    baseline(mask, torch.zeros(1, 4, 8, 16), *torch.zeros(2, 1, 2, 8, 16))
    assert heads == [4]
    assert baseline.why_not(replace(CASE, queries=8192, keys=8192, heads=64, kv_heads=8)) is None  # the mask alone


@pytest.mark.parametrize("name", [*LAYOUTS, "random"])
def test_query_intervals_say_the_mask(name):
    """What cudnn.flex_attention reads, against the dense mask; a row of a random seed too."""
    seed = random.randrange(1000)
    layout = LAYOUTS.get(name) or random_layout(random.Random(seed), 150)
    mask = layout.mask()
    ends = libraries.query_intervals(mask, 2)
    assert ends.shape[2] % 2 == 1
    key = torch.arange(mask.num_keys)
    dense = key < ends[..., :1]
    for place in range(1, ends.shape[2], 2):
        dense = dense | ((ends[..., place, None] <= key) & (key < ends[..., place + 1, None]))
    assert torch.equal(dense, mask.to_dense().expand(2, -1, -1)), seed
    assert torch.equal(ends, ends.cummax(-1).values)


def test_the_dense_mask_of_another_mask_is_told_apart(suite):
    """A speed of light under another mask is marked, and gets the FLOPs of its own."""

    class Causal(Wrong):
        def mask(self, case, mask):
            return IntervalMask.causal(case.queries, mask.device)

    suite(Causal(lambda out, q, k, v: out))
    forward = next(attention.run("small", "wrong", ONCE))
    assert not forward["same_mask"]
    assert forward["area"] == CASE.batch * CASE.queries * (CASE.queries + 1) // 2
