"""token ~ softmax(logits / temperature): the text that follows documents so far, greedy at temperature 0."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transfusion.generation.rows import Rows, check_contexts, inference
from transfusion.model import Transfusion
from transfusion.sequence import Document, Text


def generate_text(
    model: Transfusion,
    contexts: Sequence[Document],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """-> for each context the tokens that follow it, (at most max_new_tokens,) int64 on the CPU.

    A row ends with its first EOS or BOI, which is its last token, or at the limit. A row depends on its own context
    and seed alone; a finished row costs nothing more.

    Args:
        model: in any mode, which is kept.
        contexts: documents so far, each a Text that begins with BOS, then any Text and clean Image segments.
        max_new_tokens: the limit, at least 1.
        temperature: 0 takes the likeliest token, as the paper does.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest likeliest tokens, of those, whose probabilities add up to top_p or more.
        seeds: one int for each context; needed where temperature > 0.
        impl: of the kernels.

    Raises:
        ValueError: an argument that does not fit, named with the fix.
        FloatingPointError: logits that are not finite, naming the token.
    """
    check_contexts(model, contexts)
    _check(max_new_tokens, temperature, top_k, top_p)
    if temperature > 0 and (seeds is None or len(seeds) != len(contexts)):
        given = "no" if seeds is None else len(seeds)
        raise ValueError(f"temperature={temperature} needs one seed for each of {len(contexts)} contexts, got {given}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]
    stop = {model.config.special.eos, model.config.special.boi}
    tokens: list[list[int]] = [[] for _ in contexts]
    active = list(range(len(contexts)))
    with inference(model):
        for position in range(max_new_tokens):
            documents = [(*contexts[row], Text(torch.tensor(tokens[row], dtype=torch.int64))) for row in active]
            logits = Rows(model, documents, impl).next_token_logits()
            if not logits.isfinite().all():
                raise FloatingPointError(
                    f"the logits of new token {position + 1} are not finite; look for NaN in the weights"
                )
            if temperature == 0:
                chosen = logits.argmax(-1).tolist()
            else:
                probabilities = token_probabilities(logits.cpu(), temperature, top_k, top_p)
                chosen = [_draw(probabilities[i], generators[row]) for i, row in enumerate(active)]
            for row, token in zip(active, chosen, strict=True):
                tokens[row].append(token)
            active = [row for row, token in zip(active, chosen, strict=True) if token not in stop]
            if not active:
                break
    return [torch.tensor(row, dtype=torch.int64) for row in tokens]


def token_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """softmax(logits / temperature) over the tokens that top_k, then top_p, leave: (B, vocab_size) float64.

    The likeliest token is always left. Ties are broken by the sort, so that exactly top_k tokens are left. The sums
    start at the unlikely end, where added from the other one they would vanish beside 1, and top_p=1 would cut them.
    """
    scaled = logits.double() / temperature
    descending, order = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        descending[:, top_k:] = -torch.inf
    if top_p is not None:
        probabilities = descending.softmax(-1)
        onwards = probabilities.flip(-1).cumsum(-1).flip(-1)  # what each token and the less likely ones hold
        cut = onwards <= 1 - top_p
        cut[:, 0] = False
        descending = descending.masked_fill(cut, -torch.inf)
    return torch.zeros_like(scaled).scatter(-1, order, descending.softmax(-1))


def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be a number >= 0; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; None is no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be within (0, 1]; None is no limit")
