"""The steps that CUDA replays: one graph without a break or a look at a value, and no new one as rows get longer."""

import gc
import threading
import time
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
from rigged import BOI, EOS, SHAPE, contexts, options_of, paint, random_model, write

from transfusion.generation import Guidance, generate, graphs, interleaved
from transfusion.generation.cache import KVCache
from transfusion.generation.graphs import Replayed
from transfusion.generation.rows import Denoiser, Rows, inference
from transfusion.generation.text import TextSampling


@pytest.fixture
def one_graph(monkeypatch):
    """`Replayed` through `torch.compile` in place of a captured graph; a cache for every length, as on CUDA."""
    torch._dynamo.reset()
    monkeypatch.setattr(KVCache, "is_static", True)
    compiled = []

    def call(self, function, *arguments):
        if not hasattr(self, "_compiled"):
            function(*arguments)  # the warm-up before a capture
            self._compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
            compiled.append(self)
        return self._compiled(*arguments)

    monkeypatch.setattr(Replayed, "__call__", call)
    yield compiled
    torch._dynamo.reset()


def story(model):
    torch.manual_seed(0)
    tokens, noisy = torch.randint(5, 24, (4, 4)), torch.randn(3, 4, *SHAPE)
    torch.manual_seed(1)
    with inference(model):
        rows, _ = Rows.start(model, contexts(), 48)
        results = [rows.next(column).clone() for column in tokens]
        rows.next(torch.full((4,), BOI))
        single, _ = Rows.start(model, contexts()[:1], 20)
        denoiser = Denoiser(rows, SHAPE, single.take([0] * 4))
        for latents in noisy:
            results.append(denoiser(latents, torch.tensor([700, 20, 3, 999])).clone())
            results += [each.clone() for each in denoiser.both(latents, torch.tensor([7, 200, 30, 999]))]
    return results


def test_a_step_is_one_graph_for_every_length(seed, one_graph, monkeypatch):
    model = random_model(seed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = story(model)
    assert len(one_graph) == 3  # a token, an image alone, an image with its twin
    monkeypatch.undo()
    for ours, plain in zip(compiled, story(model), strict=True):
        torch.testing.assert_close(ours, plain, msg=f"seed {seed}")


def test_elsewhere_a_replayed_function_is_just_called():
    calls, replayed = [], Replayed()

    def double(x, y):
        calls.append(1)
        return x * 2 + y

    assert replayed(double, torch.ones(2), torch.ones(2)).tolist() == [3, 3]
    assert replayed(double, torch.ones(3), torch.zeros(3)).tolist() == [2, 2, 2] and len(calls) == 2


def test_caches_and_graphs_die_with_the_call_that_made_them(seed):
    """On CUDA a graph has a memory pool of its own, and nothing collects cycles before the next one is captured."""
    model = random_model(seed)

    def alive():
        return sum(type(each) in (KVCache, Replayed) for each in gc.get_objects())

    before = alive()
    gc.disable()
    try:
        options = options_of(model, guidance=Guidance(2.0, interval=(0.2, 0.8)))
        generate(model, [paint(*context, tokens=3) for context in contexts()], **options)
        assert alive() == before
    finally:
        gc.enable()


@pytest.fixture
def second_gpu(monkeypatch):
    """A tensor of cuda:1, and a `torch.cuda` that takes notes."""
    monkeypatch.setattr(torch, "cuda", MagicMock())
    monkeypatch.setattr(graphs, "_STREAMS", {})
    tensor = MagicMock()
    tensor.device = torch.device("cuda:1")
    return tensor


def test_a_step_is_captured_at_its_third_call_on_its_own_gpu(second_gpu):
    replayed, function = Replayed(), MagicMock()
    for calls, replays in ((1, 0), (2, 0), (3, 1), (3, 2), (3, 3)):
        replayed(function, second_gpu)
        assert function.call_count == calls
        assert function.call_args.args == (second_gpu.clone.return_value,)  # at one address, and aligned alike before
        assert torch.cuda.CUDAGraph.return_value.replay.call_count == replays
    torch.cuda.Stream.assert_called_once_with(second_gpu.device)
    assert torch.cuda.graph.call_args.kwargs == {
        "stream": torch.cuda.Stream.return_value,
        "capture_error_mode": "thread_local",  # other threads may use the GPU meanwhile
    }
    assert all(call.args == (second_gpu.device,) for call in torch.cuda.device.call_args_list)


def test_one_capture_at_a_time(second_gpu):
    inside, most = [], []

    @contextmanager
    def graph(*_, **__):
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        yield
        inside.pop()

    torch.cuda.graph = graph

    def run():
        replayed = Replayed()
        for _ in range(3):
            replayed(MagicMock(), second_gpu)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_who_rests_draws_nothing(seed, monkeypatch):
    """What a row writes after its image is its own seed's, however long it waited for the others before."""
    model = random_model(seed).double()
    requests = [paint(*context, tokens=12, images=3, seed=seed + i) for i, context in enumerate(contexts() * 2)]
    options = options_of(model, sampling=TextSampling(2.0))

    def results(requests):
        return [each.token_ids.tolist() for each in generate(model, requests, **options)]

    alone = [row for request in requests for row in results([request])]
    monkeypatch.setattr(interleaved, "is_replayed", lambda device: True)
    assert results(requests) == alone


def test_rows_that_are_done_rest_until_half_are(seed, monkeypatch):
    """Each batch of another size would be another graph; what the others write does not change."""
    model = random_model(seed)
    head, ends = model.head.forward, torch.tensor([EOS, BOI])  # no text ends before its limit: the sizes are 8 to 1
    monkeypatch.setattr(model.head, "forward", lambda states: head(states).index_fill(-1, ends, -1e4))
    requests = [write(*context, tokens=1 + 3 * number, seed=seed) for number, context in enumerate(contexts() * 2)]
    sizes = []

    def results():
        sizes.clear()
        return [each.token_ids.tolist() for each in generate(model, requests, **options_of(model))]

    genuine = Rows.next
    monkeypatch.setattr(Rows, "next", lambda self, *given: (sizes.append(len(self)), genuine(self, *given))[1])
    wanted = results()
    assert len(set(sizes)) > 4
    monkeypatch.setattr(interleaved, "is_replayed", lambda device: True)
    assert results() == wanted
    assert len(set(sizes)) <= 4 and sizes[0] == len(requests)  # halved three times at most
