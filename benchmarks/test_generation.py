"""Generation, end to end: cached denoising against recomputing, decoding against Hugging Face's `generate` on the same
weights, drawing against transfusion-pytorch of equal size, and the cache's memory against arithmetic.

Each pair is timed back to back, in turn, in one process; nothing is timed before both sides have been checked.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import DEVICE
from benchmarks.clock import synchronized
from transfusion import ModelConfig, Transfusion
from transfusion.diffusion.sampler import make_scheduler
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.generation import Guidance, Request, denoise, generate
from transfusion.generation.cache import KVCache
from transfusion.generation.rows import Denoiser, Rows, full_hidden, inference
from transfusion.kernels.testing import judge
from transfusion.sequence import Image, Text

_PREFIX, _SHAPE, _STEPS = 1024, (8, 16, 16), 4  # 64 image tokens after 1024 of text


def small(**changes: Any) -> Transfusion:
    """A model that a CPU evaluates in tens of milliseconds; weights large enough to tell right from wrong."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "dim": 256, "layers": 4, "heads": 4, "schedule": NoiseSchedule("v_prediction")}
    return Transfusion(ModelConfig(**(sizes | changes))).to(DEVICE).eval()


def prompt(tokens: int, vocab_size: int = 1024) -> Text:
    """BOS and random tokens, the same at every call."""
    ids = torch.randint(5, vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[0] = 1
    return Text(ids)


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], rounds: int = 5) -> float:
    """Median of slow's time over fast's, one after the other in every round."""
    slow, fast = synchronized(slow), synchronized(fast)
    quotients = []
    for _ in range(rounds + 1):
        times = []
        for work in (slow, fast):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        quotients.append(times[0] / times[1])
    return statistics.median(quotients[1:])


# ---------------------------------------------------------------- denoising


def steps_of(model: Transfusion, noise: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The last prediction of `_STEPS` steps, from the whole sequence anew, and from the cache, its prefix included."""
    text, moments = prompt(_PREFIX), torch.linspace(999, 99, _STEPS).long().tolist()
    image_rows = slice(_PREFIX + 1, _PREFIX + 1 + 64)

    def recomputed() -> Tensor:
        for _ in moments:  # the timestep changes no cost; all are 0, as full_hidden has them
            hidden, _lengths = full_hidden(model, [(text, Image(noise))], "auto")
            result = model.decode_images(hidden[:, image_rows], None)
        return result

    def cached() -> Tensor:
        rows, _ = Rows.start(model, [(text,)], _PREFIX + 66)
        rows.next(torch.tensor([model.config.special.boi]))
        denoiser = Denoiser(rows, _SHAPE)
        for _ in moments:
            result = denoiser(noise[None].to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE))
        return result

    return recomputed, cached


def test_cached_denoising(benchmark: Any) -> None:
    model, noise = small(), torch.randn(_SHAPE)
    recomputed, cached = steps_of(model, noise)
    with inference(model):
        patch = model.config.patch_size
        as_tokens = torch.nn.functional.unfold(cached(), patch, stride=patch).unflatten(1, (-1, patch**2))
        ours = as_tokens.permute(0, 3, 2, 1).flatten(2)  # i (c p q) n -> i n (p q c)
        gold = steps_of(model.double(), noise)[0]()
        model.float()
        verdict = judge(ours, recomputed(), gold)
        assert verdict.passed, verdict
        times = _STEPS * 5  # of one image: so many steps that the prefix is read once for
        faster = ratio(lambda: [recomputed() for _ in range(times // _STEPS)], lambda: many(model, noise, times))
        benchmark.extra_info["times_faster"] = faster
        benchmark.group = f"{_STEPS} denoising steps after {_PREFIX} tokens"
        benchmark.pedantic(synchronized(cached), warmup_rounds=1, rounds=5)
    assert faster >= 5, faster


def many(model: Transfusion, noise: Tensor, steps: int) -> Tensor:
    """`steps` cached steps of one image, the prefix and BOI included."""
    rows, _ = Rows.start(model, [(prompt(_PREFIX),)], _PREFIX + 66)
    rows.next(torch.tensor([model.config.special.boi]))
    denoiser, moment = Denoiser(rows, _SHAPE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for _ in range(steps):
        result = denoiser(noise[None].to(DEVICE), moment)
    return result


def test_guidance_in_one_forward(benchmark: Any) -> None:
    """Both branches in one batch, against one after the other."""
    model, noise = small(), torch.randn(1, *_SHAPE, device=DEVICE)
    moment = torch.full((1,), 500, device=DEVICE)
    with inference(model):
        rows, _ = Rows.start(model, [(prompt(64),)], 64 + 66)
        twins, _ = Rows.start(model, [(prompt(1),)], 1 + 66)
        boi = torch.tensor([model.config.special.boi])
        for each in (rows, twins):
            each.next(boi)
        together, alone, twin = Denoiser(rows, _SHAPE, twins), Denoiser(rows, _SHAPE), Denoiser(twins, _SHAPE)
        one = torch.cat(together.both(noise, moment))
        two = torch.cat([alone(noise, moment).clone(), twin(noise, moment).clone()])
        torch.testing.assert_close(one, two)
        two_passes = lambda: (alone(noise, moment), twin(noise, moment))  # noqa: E731
        benchmark.extra_info["times_faster_than_two_passes"] = ratio(
            two_passes, lambda: together.both(noise, moment), 20
        )
        benchmark.group = "guidance, batch 1"
        benchmark.pedantic(synchronized(lambda: together.both(noise, moment)), warmup_rounds=2, rounds=20)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("batch", [1, 8])
def test_decoding(benchmark: Any, batch: int) -> None:
    """Greedy tokens a second, against Hugging Face's `generate` with its static and its growing cache."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=1024, num_key_value_heads=2, eos_token_id=2, bos_token_id=1, **sizes)
    llama = transformers.LlamaForCausalLM(config).to(DEVICE).eval()
    model = Transfusion.from_llama(llama).to(DEVICE).eval()
    count, text = 64, prompt(32)
    requests = [Request((text,), max_new_tokens=count) for _ in range(batch)]
    ids = text.token_ids.expand(batch, -1).to(DEVICE)

    def ours() -> list[list[int]]:
        return [each.token_ids.tolist() for each in generate(model, requests, latent_shape=_SHAPE)]

    def theirs() -> list[list[int]]:
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        done = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return [row[32:].tolist() for row in done]

    assert ours() == theirs()
    benchmark.extra_info["times_faster"] = ratio(theirs, ours)
    benchmark.group = f"{count} tokens after 32, batch {batch}"
    benchmark.pedantic(synchronized(ours), warmup_rounds=1, rounds=5)
    benchmark.extra_info["tokens_per_second"] = batch * count / benchmark.stats.stats.median


# ---------------------------------------------------------------- images


def test_drawing(benchmark: Any) -> None:
    """Guided images a second from captions, against transfusion-pytorch: as many parameters and evaluations."""
    if reason := peers.why_not():
        pytest.skip(reason)
    model, batch, steps = small(schedule=NoiseSchedule("flow_prediction")), 4, 20
    captions = [prompt(8 + index) for index in range(batch)]
    _, peer, _ = peers.training_step("", [[(captions[0], Image(torch.zeros(_SHAPE)))]], model.config)
    peer.eval()
    scheduler = make_scheduler(model.config.schedule)

    def ours() -> Tensor:
        options = {"scheduler": scheduler, "steps": steps, "guidance": Guidance(3.0)}
        return denoise(model, [(caption,) for caption in captions], _SHAPE, seeds=range(batch), **options)

    def theirs() -> list[Any]:
        # its midpoint rule asks the network twice in each of the intervals between `modality_steps` times
        options = {"max_length": 1, "modality_steps": steps // 2 + 1, "cfg_scale": 3.0}
        prompts = [caption.token_ids.to(DEVICE) for caption in captions]
        return peer.sample_many(prompts, force_modality_at_start=(0, (8, 8)), **options)

    assert ours().isfinite().all() and len(theirs()) == batch
    benchmark.extra_info["times_faster"] = ratio(theirs, ours, 3)
    benchmark.group = f"{batch} guided images of 64 tokens, {steps} evaluations"
    benchmark.pedantic(synchronized(ours), warmup_rounds=1, rounds=3)
    benchmark.extra_info["images_per_second"] = batch / benchmark.stats.stats.median


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(DEVICE != "cuda", reason="the allocator's figure is a GPU's")
def test_memory_of_the_cache(benchmark: Any) -> None:
    model = small()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = KVCache.of(model, 8, 4096)
    arithmetic = 2 * 4 * 8 * 4 * 4096 * 64 * 4
    # besides the buffers only the lengths, in one block of the allocator
    assert cache.nbytes == arithmetic <= torch.cuda.memory_allocated() - before <= arithmetic + 512
    benchmark.extra_info["bytes"] = arithmetic
    benchmark.pedantic(lambda: KVCache.of(model, 8, 4096), rounds=3)
