"""The checks of suite "generation", in the dtypes of every machine: a GPU's pairs are timed in bfloat16."""

import pytest
import torch

from benchmarks import generation
from benchmarks.cases import DEVICE
from transfusion.generation.cache import Window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", generation.CASES)
def test_each_pair_passes_its_check(monkeypatch, name, dtype):
    case = generation.CASES[name]
    if reason := case.why_not():
        pytest.skip(reason)
    monkeypatch.setitem(generation._SIZES, DEVICE, generation.Sizes(64, 2, 2, dtype))
    monkeypatch.setattr(generation, "_PREFIX", 64)
    pair = case.make()
    with torch.inference_mode():
        assert not pair.wrong()


@pytest.mark.parametrize("name", ["denoise_after_1k_tokens", "decode_batch_1"])
def test_a_wrong_network_is_not_timed(monkeypatch, name):
    """Keys that are a little off: every way through the cache is another function then."""
    case = generation.CASES[name]
    if reason := case.why_not():
        pytest.skip(reason)
    monkeypatch.setitem(generation._SIZES, DEVICE, generation.Sizes(64, 2, 2, torch.float32))
    monkeypatch.setattr(generation, "_PREFIX", 64)
    pair = case.make()
    attend = Window.attend
    monkeypatch.setattr(Window, "attend", lambda self, layer, q, k, v, impl: attend(self, layer, q, k * 1.01, v, impl))
    with torch.inference_mode():
        assert pair.wrong()
