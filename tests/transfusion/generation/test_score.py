"""log p(text | context) against the loop written plainly, and against what generation reports."""

import pytest
import torch
from rigged import (
    BOS,
    GOOD,
    SHAPE,
    VOCABULARY,
    contexts,
    in_several_orders,
    options_of,
    plain_text,
    random_model,
    rows_by_hand,
    text,
    write,
)

from transfusion.generation import generate, score
from transfusion.kernels.testing import judge
from transfusion.sequence import Image


@torch.no_grad()
def plain_score(model, context, target):
    """One forward for each token, over what comes before it."""
    result = []
    for count, token in enumerate(target.tolist()):
        batch, hidden = rows_by_hand(model, (*context, text(*target[:count].tolist())))
        states = hidden(batch.latents.to(model.head.weight.dtype), torch.zeros(batch.num_images, dtype=torch.int64))
        result.append(model.head(states[0, -1]).log_softmax(-1)[token])
    return torch.stack(result)


def test_score_is_the_definition(seed):
    model = random_model(seed)
    torch.manual_seed(seed)
    targets = [torch.randint(2, VOCABULARY, (count,)) for count in (1, 5, 3, 7)]
    prompts = contexts()

    def plain():
        return torch.cat([plain_score(model, *pair) for pair in zip(prompts, targets, strict=True)])

    ours, eager = score(model, prompts, targets), in_several_orders(plain)
    model.double()
    gold = plain()
    assert [each.shape for each in ours] == [target.shape for target in targets]
    verdict = judge(torch.cat(ours), eager, gold)
    assert verdict.passed, (seed, verdict)


def test_what_was_generated_scores_what_generation_said(seed):
    model = random_model(seed).double()
    fixed = contexts()
    results = generate(model, [write(*context) for context in fixed], **options_of(model))
    for each, logprobs in zip(results, score(model, fixed, [r.token_ids for r in results]), strict=True):
        torch.testing.assert_close(logprobs.double(), each.logprobs, msg=f"seed {seed}")
    assert plain_text(model, fixed[1], 8)[0] == results[1].token_ids.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_are_whole_numbers_of_any_kind(dtype, seed):
    model, target = random_model(seed), torch.tensor([5, 7, 2])
    narrow, wide = (score(model, [GOOD], [each])[0] for each in (target.to(dtype), target))
    assert torch.equal(narrow, wide)


def test_what_is_no_list_is_named(seed):
    with pytest.raises(TypeError, match="targets must be a list, got int"):
        score(random_model(seed), [GOOD], 5)


@pytest.mark.parametrize(
    ("contexts_", "targets", "message"),
    [
        ([GOOD], [], "0 targets for 1 contexts"),
        ([GOOD], [torch.zeros(0, dtype=torch.int64)], "target 0 is empty"),
        (
            [GOOD],
            [torch.zeros(1, 2, dtype=torch.int64)],
            r"target 0 must have one dimension, .* \(1, 2\)",
        ),
        ([GOOD], [torch.tensor([VOCABULARY])], "outside the vocabulary"),
        ([(Image(torch.zeros(SHAPE)),)], [torch.tensor([5])], "must begin with a Text"),
        ([()], [torch.tensor([BOS, 5])], "context 0 must begin with a Text .* it begins with nothing"),
    ],
)
def test_score_refuses(contexts_, targets, message, seed):
    with pytest.raises(ValueError, match=message):
        score(random_model(seed), contexts_, targets)


def test_nan_weights_are_named(seed):
    model = random_model(seed)
    with torch.no_grad():
        model.head.weight[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="look for NaN in the weights"):
        score(model, [(text(BOS, 7),)], [torch.tensor([5])])
