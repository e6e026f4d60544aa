"""The suite of what calls cost the host: its calls are right, and what is wrong is not timed."""

import pytest
import torch

from benchmarks import host
from benchmarks.cases import DEVICE
from benchmarks.clock import QUICK
from benchmarks.gate import failures


@pytest.mark.parametrize(("case", "baseline"), host.pairs())
def test_calls_pass_their_check(case, baseline):
    assert failures(host.check(case, baseline)) == ""


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is timed")
def test_without_a_device_it_says_why():
    (row,) = host.run("attention", "ours", QUICK)
    assert row["status"] == "skipped" and "without a device" in row["reason"]


@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_wrong_is_not_timed(wrong, monkeypatch):
    attend, timed = host.transfusion_attention, []

    def altered(*arguments, impl):
        timed.append(impl)
        return attend(*arguments, impl=impl) + (0.1 if wrong and impl == "auto" else 0)

    monkeypatch.setattr(host, "why_not", lambda: None)
    monkeypatch.setattr(host, "transfusion_attention", altered)
    (row,) = host.run("attention", "ours", QUICK)
    if wrong:
        assert row["status"] == "failed" and "result 0" in row["reason"] and timed == ["auto", "reference", "reference"]
    else:
        assert row["status"] == "ok" and 0 < row["p20"] <= row["p50"] <= row["p80"] and row["calls"] >= QUICK.least
        assert timed.count("auto") == 1 + 20 + row["calls"]


def test_every_call_is_on_the_same_numbers():
    for case in host.CASES:
        first, second = (host.call_of(case, "reference")() for _ in range(2))
        pairs = zip(host._tensors(first), host._tensors(second), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
