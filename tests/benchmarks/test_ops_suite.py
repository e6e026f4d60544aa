"""Suite "ops": every pair passes its check, and a work that is slightly off fails it."""

import pytest
import torch

from benchmarks import ops
from benchmarks.clock import QUICK
from benchmarks.gate import failures

SMALL = (4, 2, 8, 12, 2)
PAIRS = [(op, kind, noise) for op, noises in ops.OPS.items() for kind in ("ours", "eager") for noise in noises]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ops, "IMAGES", {"small": SMALL})


@pytest.mark.parametrize(("op", "kind", "noise"), PAIRS)
def test_a_work_that_is_off_fails_its_check(monkeypatch, op, kind, noise):
    x, work = ops.make("small"), ops.work_of(op, kind)
    off = 1 + 1e-4 if work(x, noise).dtype == torch.float32 else 1.02
    assert not failures(ops.check(op, kind, x, noise))
    monkeypatch.setattr(ops, "work_of", lambda *_: lambda inputs, source: work(inputs, source) * off)
    assert failures(ops.check(op, kind, x, noise))


@pytest.mark.parametrize("noise", ["seeded", "none"])
def test_a_step_has_a_row_which_says_its_bytes(noise):
    (row,) = ops.run("denoise_step small", f"ours, {noise}", QUICK)
    images, channels, height, width, _ = SMALL
    elements = images * channels * height * width
    assert (row["status"], row["measure"]) == ("ok", "forward")
    assert row["bytes"] == elements * (2 * 4 + 2 * ops.DTYPE.itemsize)  # latents in and out; two predictions


def test_without_noise_nothing_is_drawn():
    x, work = ops.make("small"), ops.work_of("denoise_step", "ours")
    assert torch.equal(work(x, "none"), work(x, "none"))
    assert not torch.equal(work(x, "none"), work(x, "seeded"))
    eager = ops.work_of("denoise_step", "eager")
    assert not torch.equal(eager(x, "seeded"), eager(x, "seeded"))
