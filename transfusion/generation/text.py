"""token ~ softmax(logits / temperature) over the tokens that top-k, top-p and min-p leave; greedy at temperature 0."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.generation.arguments import real
from transfusion.kernels.registry import whole


@dataclass(frozen=True)
class TextSampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token, as the paper does.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest likeliest tokens, of those, whose probabilities add up to top_p or more.
        min_p: and of those, from the tokens at least min_p times as likely as the likeliest (arXiv 2407.01082).
        stop_tokens: ids that end a document as EOS does; they are its last token. Any iterable.

    Raises:
        ValueError: a number out of range.
        TypeError: what is no number.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_tokens", _ids(self.stop_tokens))
        real("temperature", self.temperature)
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                real(name, getattr(self, name))
        if self.top_k is not None:
            whole("top_k", self.top_k)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a number >= 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; None is no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be within (0, 1]; None is no limit")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be within (0, 1]; None is no limit")


def _ids(given: Any) -> tuple[int, ...]:
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise TypeError(f"stop_tokens={given!r} must be token ids, such as (2,), got {type(given).__name__}")
    ids = tuple(whole("a stop token", each) for each in given)
    if ids and min(ids) < 0:
        raise ValueError(f"stop_tokens={ids} must be token ids, from 0 on")
    return ids


class Choice(NamedTuple):
    """Of each row: a token, and its natural log-probability under the model itself (temperature 1, nothing cut)."""

    tokens: list[int]
    logprobs: list[float]


def choose(logits: Tensor, sampling: TextSampling, generators: Sequence[torch.Generator]) -> Choice:
    """The next token of each row of logits (B, vocab_size); row i draws from generators[i] alone.

    Only the choice is copied to the host. Raises `FloatingPointError` where a logit is not finite.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = _drawn(token_probabilities(logits, sampling), generators)
    logprobs = logits.log_softmax(-1, dtype=torch.float64).gather(1, tokens[:, None])[:, 0]
    finite = logits.isfinite().all(-1)
    ids, values, sound = torch.stack([tokens.double(), logprobs, finite.double()]).cpu()
    _check_finite(sound.all())
    return Choice([int(token) for token in ids.tolist()], values.tolist())


def _drawn(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Of each row the token at which the running sum passes a share of the whole, uniform, that the host draws: (B,).

    A token of probability 0 passes nothing. Of a row that is not finite any token, which `choose` refuses.
    """
    shares = torch.stack([torch.rand((), dtype=torch.float64, generator=own, device="cpu") for own in generators])
    running = probabilities.cumsum(-1)
    whole = running[:, -1:]
    share = torch.minimum(shares.to(whole.device)[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(running, share, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise FloatingPointError("the logits of a new token are not finite; look for NaN in the weights")


def token_probabilities(logits: Tensor, sampling: TextSampling) -> Tensor:
    """softmax(logits / temperature) over the tokens that top_k, then top_p, then min_p leave: (B, vocab_size) float64.

    The likeliest token is always left. Of tokens equally likely only so many are left that top_k are. The sums
    start at the unlikely end, where added from the other one they would vanish beside 1, and top_p=1 would cut them.
    """
    # from the likeliest down: of the smallest temperatures the others are -inf, and none is inf
    wide = logits.double()
    scaled = (wide - wide.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return _drop_unlikely(scaled.softmax(-1), sampling.min_p)
    kept = scaled.shape[-1] if sampling.top_k is None else min(sampling.top_k, scaled.shape[-1])
    descending, order = scaled.topk(kept)
    probabilities = descending.softmax(-1)
    if sampling.top_p is not None:
        onwards = probabilities.flip(-1).cumsum(-1).flip(-1)  # what each token and the less likely ones hold
        cut = onwards <= 1 - sampling.top_p
        cut[:, 0] = False
        probabilities = descending.masked_fill(cut, -torch.inf).softmax(-1)
    return torch.zeros_like(scaled).scatter(-1, order, _drop_unlikely(probabilities, sampling.min_p))


def _drop_unlikely(probabilities: Tensor, min_p: float | None) -> Tensor:
    if min_p is None:
        return probabilities
    likeliest = probabilities.amax(-1, keepdim=True)
    left = probabilities.masked_fill(probabilities < min_p * likeliest, 0.0)
    return left / left.sum(-1, keepdim=True)
