"""`generate_text` against the loop written plainly, and against a rigged network."""

import random

import pytest
import torch
from rigged import (
    BOI,
    BOS,
    EOI,
    EOS,
    GOOD,
    SHAPE,
    chain,
    contexts,
    random_model,
    rows_by_hand,
    text,
)

from transfusion.generation import generate_text
from transfusion.generation.text import token_probabilities
from transfusion.sequence import Image


@torch.no_grad()
def plain_greedy(model, context, limit):
    tokens = []
    while len(tokens) < limit and not (tokens and tokens[-1] in (EOS, BOI)):
        batch, hidden = rows_by_hand(model, (*context, text(*tokens)))
        timestep = torch.zeros(batch.num_images, dtype=torch.int64)
        tokens.append(int(model.head(hidden(batch.latents, timestep)[0, -1]).argmax()))
    return tokens


def test_greedy_text_is_the_loop_written_plainly(seed):
    """In float64, where no rounding decides between two tokens."""
    model = random_model(seed).double()
    prompts = contexts()
    result = generate_text(model, prompts, max_new_tokens=8)
    assert [row.tolist() for row in result] == [plain_greedy(model, prompt, 8) for prompt in prompts], seed


def test_sampling_one_token_of_many_is_greedy(seed):
    model = random_model(seed).double()
    options = {"max_new_tokens": 6, "temperature": 1.3, "seeds": [seed + i for i in range(4)]}
    prompts = contexts()
    greedy = [row.tolist() for row in generate_text(model, prompts, max_new_tokens=6)]
    assert [row.tolist() for row in generate_text(model, prompts, top_k=1, **options)] == greedy, seed
    for top_p in (0.001, 1e-30):  # the likeliest token is left, however little is asked for
        assert [row.tolist() for row in generate_text(model, prompts, top_p=top_p, **options)] == greedy, seed


def test_sampled_text_depends_on_its_seed_alone(seed):
    model = random_model(seed).double()
    prompts = contexts()
    options = {"max_new_tokens": 6, "temperature": 1.5}
    seeds = [seed + i for i in range(4)]
    together = generate_text(model, prompts, seeds=seeds, **options)
    for prompt, own, row in zip(prompts, seeds, together, strict=True):
        (alone,) = generate_text(model, [prompt], seeds=[own], **options)
        assert torch.equal(alone, row), seed
    many = generate_text(model, [prompts[0]] * 16, seeds=range(16), **options)
    assert len({tuple(row.tolist()) for row in many}) > 1, seed


@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
def test_token_probabilities_are_the_definition(top_k, top_p, seed):
    torch.manual_seed(seed)
    logits, temperature = 3 * torch.randn(5, 20), random.Random(seed).uniform(0.3, 3)
    result = token_probabilities(logits, temperature, top_k, top_p)
    for row, actual in zip((logits.double() / temperature).softmax(-1), result, strict=True):
        order = row.argsort(descending=True).tolist()
        kept = order[:top_k]
        if top_p is not None:
            total = row[kept].sum()
            fewest = next((n for n in range(1, len(kept)) if row[kept[:n]].sum() >= top_p * total), len(kept))
            kept = kept[:fewest]
        expected = torch.zeros(20, dtype=torch.float64).index_copy(0, torch.tensor(kept), row[kept] / row[kept].sum())
        assert (actual > 0).sum() == len(kept), seed
        torch.testing.assert_close(actual, expected, msg=f"seed {seed}")


def test_each_row_stops_by_itself(seed, monkeypatch):
    model = random_model(seed)
    seen = chain(model, monkeypatch, {10: 11, 11: 12, 12: EOS, 13: BOI, 14: 14, 15: EOS, EOI: 15})
    prompts = [
        (text(BOS, 10),),
        (text(BOS, 5, 6, 7, 13),),
        (text(BOS, 14),),
        (text(BOS), Image(torch.randn(SHAPE))),
    ]
    result = generate_text(model, prompts, max_new_tokens=5)
    assert [row.tolist() for row in result] == [[11, 12, EOS], [BOI], [14] * 5, [15, EOS]]
    assert [len(batch.token_ids) for batch, *_ in seen] == [4, 3, 2, 1, 1]
    assert all(row.dtype == torch.int64 for row in result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": []}, "no contexts"),
        ({"contexts": [(Image(torch.zeros(SHAPE)),)]}, "must begin with a Text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"temperature": 1.0}, "temperature=1.0 needs one seed for each of 1 contexts, got no"),
        ({"temperature": 1.0, "seeds": [1, 2]}, "needs one seed for each of 1 contexts, got 2"),
    ],
)
def test_generate_text_refuses(change, message, seed):
    with pytest.raises(ValueError, match=message):
        generate_text(random_model(seed), **({"contexts": [GOOD], "max_new_tokens": 2} | change))
