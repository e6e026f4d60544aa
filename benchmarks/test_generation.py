"""Generation under pytest-benchmark: the cases and checks of the suite "generation", and the cache's memory."""

from typing import Any

import pytest
import torch

from benchmarks import generation
from benchmarks.cases import DEVICE
from benchmarks.clock import Effort, in_turn, synchronized
from transfusion.generation.cache import KVCache

LEAST = {"denoise_after_1k_tokens": 5.0}  # times faster than the other way, on any machine


@pytest.mark.parametrize("name", generation.CASES)
def test_generation(benchmark: Any, name: str) -> None:
    case = generation.CASES[name]
    if reason := case.why_not():
        pytest.skip(reason)
    pair = case.make()
    with torch.inference_mode():
        assert not pair.wrong()
        quotient = in_turn(lambda _: pair.theirs(), lambda _: pair.ours(), Effort(0.0, 3, 3))[2]
        benchmark.extra_info |= {"times_faster": quotient, "beside": case.baseline}
        benchmark.group = name
        benchmark.pedantic(synchronized(pair.ours), warmup_rounds=1, rounds=5)
    benchmark.extra_info[f"{pair.unit}_per_second"] = pair.count / benchmark.stats.stats.median
    assert quotient >= LEAST.get(name, 0.0), quotient


@pytest.mark.skipif(DEVICE != "cuda", reason="the allocator's figure is a GPU's")
def test_memory_of_the_cache(benchmark: Any) -> None:
    model = generation.network()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = KVCache.of(model, 8, 4096)
    config, itemsize = model.config, model.head.weight.element_size()
    arithmetic = 2 * config.layers * 8 * config.heads * 4096 * 64 * itemsize
    # besides the buffers only the lengths, in one block of the allocator
    assert cache.nbytes == arithmetic <= torch.cuda.memory_allocated() - before <= arithmetic + 512
    benchmark.extra_info["bytes"] = arithmetic
    benchmark.pedantic(lambda: KVCache.of(model, 8, 4096), rounds=3)
