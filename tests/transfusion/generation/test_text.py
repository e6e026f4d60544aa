"""Text against the loop written plainly over the whole sequence, and against a rigged network."""

import random
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from rigged import (
    BOI,
    BOS,
    EOI,
    EOS,
    GOOD,
    SHAPE,
    VOCABULARY,
    chain,
    contexts,
    options_of,
    plain_text,
    random_model,
    text,
    write,
)

from transfusion.generation import TextSampling, generate
from transfusion.generation.text import _drawn, choose, token_probabilities
from transfusion.kernels.testing import judge
from transfusion.sequence import Image


def texts(model, prompts, tokens=8, seeds=None, **sampling):
    requests = [
        write(*prompt, tokens=tokens, seed=seed) for prompt, seed in zip(prompts, seeds or [0] * 9, strict=False)
    ]
    return generate(model, requests, **options_of(model, sampling=TextSampling(**sampling)))


def ids(generations):
    return [each.token_ids.tolist() for each in generations]


@torch.no_grad()
def test_greedy_text_is_the_loop_written_plainly(seed):
    """In float64, where no rounding decides between two tokens; log-probabilities too."""
    model = random_model(seed)
    prompts, tokens = contexts(), 8
    model.double()
    result = texts(model, prompts, tokens)
    gold = [plain_text(model, prompt, tokens) for prompt in prompts]
    assert ids(result) == [row for row, _ in gold], seed
    for each, (_, logprobs) in zip(result, gold, strict=True):
        torch.testing.assert_close(each.logprobs, torch.tensor(logprobs, dtype=torch.float64), msg=f"seed {seed}")


def test_sampling_one_token_of_many_is_greedy(seed):
    model = random_model(seed).double()
    options = {"temperature": 1.3, "seeds": [seed + i for i in range(4)]}
    prompts = contexts()
    greedy = ids(texts(model, prompts))
    assert ids(texts(model, prompts, top_k=1, **options)) == greedy, seed
    for tiny in (0.001, 1e-30):  # the likeliest token is left, however little is asked for
        assert ids(texts(model, prompts, top_p=tiny, **options)) == greedy, seed
    assert ids(texts(model, prompts, min_p=1.0, **options)) == greedy, seed


def test_sampled_text_depends_on_its_seed_alone(seed):
    model = random_model(seed).double()
    prompts, seeds = contexts(), [seed + i for i in range(4)]
    together = texts(model, prompts, seeds=seeds, temperature=1.5)
    for prompt, own, row in zip(prompts, seeds, together, strict=True):
        (alone,) = texts(model, [prompt], seeds=[own], temperature=1.5)
        assert torch.equal(alone.token_ids, row.token_ids), seed
        torch.testing.assert_close(alone.logprobs, row.logprobs)
    many = texts(model, [prompts[0]] * 9, seeds=range(9), temperature=1.5)
    assert len({tuple(row) for row in ids(many)}) > 1, seed


@pytest.mark.parametrize("min_p", [None, 0.02, 0.3])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
def test_token_probabilities_are_the_definition(top_k, top_p, min_p, seed):
    torch.manual_seed(seed)
    logits, temperature = 3 * torch.randn(5, 20), random.Random(seed).uniform(0.3, 3)
    result = token_probabilities(logits, TextSampling(temperature, top_k, top_p, min_p))
    for row, actual in zip((logits.double() / temperature).softmax(-1), result, strict=True):
        kept = row.argsort(descending=True).tolist()[:top_k]
        if top_p is not None:
            held = list(accumulate(Fraction(row[token].item()) for token in kept))  # exact: a tail of 1e-17 is held too
            fewest = next(n for n, sum_of_n in enumerate(held, 1) if sum_of_n >= Fraction(top_p) * held[-1])
            kept = kept[:fewest]
        kept = [token for token in kept if row[token] >= (min_p or 0) * row.max()]
        expected = torch.zeros(20, dtype=torch.float64).index_copy(0, torch.tensor(kept), row[kept] / row[kept].sum())
        assert (actual > 0).sum() == len(kept), seed
        torch.testing.assert_close(actual, expected, msg=f"seed {seed}")


def test_drawn_tokens_have_the_probabilities_they_should(seed):
    """4000 draws of one token: each count within five standard deviations."""
    torch.manual_seed(seed)
    logits, sampling = torch.randn(1, 6), TextSampling(0.8, top_k=4)
    generator = torch.Generator().manual_seed(seed)
    draws = choose(logits.expand(4000, -1), sampling, [generator] * 4000)
    share = token_probabilities(logits, sampling)[0]
    counts = torch.bincount(torch.tensor(draws.tokens), minlength=6)
    assert ((counts - 4000 * share).abs() <= 5 * (4000 * share * (1 - share)).sqrt()).all(), seed
    gold = logits.double().log_softmax(-1)[0][draws.tokens]
    verdict = judge(torch.tensor(draws.logprobs), logits.log_softmax(-1)[0][draws.tokens], gold)
    assert verdict.passed, (seed, verdict)


def test_each_row_stops_by_itself(seed, monkeypatch):
    model = random_model(seed)
    seen = chain(model, monkeypatch, {10: 11, 11: 12, 12: EOS, 13: BOI, 14: 14, 15: EOS, EOI: 15})
    prompts = [
        (text(BOS, 10),),
        (text(BOS, 5, 6, 7, 13),),
        (text(BOS, 14),),
        (text(BOS), Image(torch.randn(SHAPE))),
    ]
    result = texts(model, prompts, 5)
    assert ids(result) == [[11, 12, EOS], [BOI], [14] * 5, [15, EOS]]
    assert [each.finish_reason for each in result] == ["eos", "images", "length", "eos"]
    assert [[segment.token_ids.tolist() for segment in each.new] for each in result] == [
        [[11, 12, EOS]], [], [[14] * 5], [[15, EOS]],
    ]  # fmt: skip
    # a finished row is gone from the batch; after the prompts, one token a row and step
    assert [tuple(x.shape) for x, _ in seen] == [(4, 9), (3, 1), (2, 1), (1, 1), (1, 1)]
    assert [positions.tolist() for _, positions in seen[1:3]] == [[[2], [2], [9]], [[3], [3]]]
    assert all(each.token_ids.dtype == torch.int64 for each in result)


def test_stop_tokens_and_the_stop_function(seed, monkeypatch):
    model = random_model(seed)
    chain(model, monkeypatch, {10: 11, 11: 12, 12: 13, 13: 14, 14: 15, 15: 16, 16: EOS})
    prompts = [(text(BOS, 10),), (text(BOS, 12),), (text(BOS, 15),)]
    result = texts(model, prompts, 8, stop_tokens=(13, 9))
    assert ids(result) == [[11, 12, 13], [13], [16, EOS]]
    assert [each.finish_reason for each in result] == ["stop", "stop", "eos"]
    requests = [write(*prompt) for prompt in prompts]
    result = generate(model, requests, **options_of(model, stop=lambda tokens: tokens[-2:] == [14, 15]))
    assert ids(result) == [[11, 12, 13, 14, 15], [13, 14, 15], [16, EOS]]


def test_max_length_ends_documents_where_the_model_ends(seed, monkeypatch):
    model = random_model(seed)
    chain(model, monkeypatch, {10: 10})
    prompts = [write(text(BOS, 10), tokens=50), write(text(BOS, 9, 9, 9, 10), tokens=50)]
    result = generate(model, prompts, **options_of(model, max_length=7))
    assert ids(result) == [[10] * 5, [10] * 2] and {each.finish_reason for each in result} == {"length"}
    with pytest.raises(ValueError, match=r"context 1 has 5 tokens; with 1 more .*max_length=5"):
        generate(model, prompts, **options_of(model, max_length=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"min_p": 0.0}, r"min_p=0\.0"),
        ({"min_p": 1.1}, r"min_p=1\.1"),
    ],
)
def test_sampling_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        TextSampling(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "asks for nothing"),
        ({"tokens": -1}, "max_new_tokens=-1"),
        ({"images": -1}, "max_images=-1"),
    ],
)
def test_requests_for_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        write(*GOOD, **change)


def test_logits_that_are_not_finite_are_refused():
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.zeros(2, VOCABULARY)
        logits[1, 3] = bad
        for sampling in (TextSampling(), TextSampling(1.0)):
            with pytest.raises(FloatingPointError, match="look for NaN"):
                choose(logits, sampling, [torch.Generator(), torch.Generator()])


def test_no_share_draws_a_token_that_is_cut(monkeypatch):
    probabilities = torch.tensor([[0, 0.3, 0, 0.7, 0], [0.1] * 5, [torch.nan] * 5], dtype=torch.float64)
    generators = [torch.Generator()] * 3
    for share, wanted in ((0.0, [1, 0]), (0.3 - 1e-9, [1, 1]), (0.3 + 1e-9, [3, 1]), (1 - 2**-53, [3, 4])):
        monkeypatch.setattr(torch, "rand", lambda *_, share=share, **__: torch.tensor(share, dtype=torch.float64))
        drawn = _drawn(probabilities, generators).tolist()
        assert drawn[:2] == wanted and 0 <= drawn[2] < 5
