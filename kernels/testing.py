"""error(kernel, gold) <= 2·error(eager, gold) + one ulp: how a kernel's result is judged, and inputs to judge it on.

gold is the reference in float64 on the same (already rounded) inputs; eager is the reference carried out in the
inputs' own precision. One order of summation may be exact by luck, so eager may be given in several orders and the
worst of them counts. No tolerance is set by hand.

Also here, for every tool that runs kernels (verify, tune, benchmarks): an error in one line, and whether the GPU is
lost after it.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.kernels.interval_mask import IntervalMask


class Verdict(NamedTuple):
    """Largest absolute error and the bound it must keep."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the bound holds. NaN fails, and so does a bound that is not finite: an eager result that overflowed
        bounds nothing."""
        return self.error <= self.bound < math.inf


def judge(actual: Tensor, eager: Tensor | Sequence[Tensor], gold: Tensor, factor: float = 2.0) -> Verdict:
    """max|actual - gold| against factor·max|eager - gold| + one ulp of `actual`'s dtype at max|gold|.

    `eager`: one result, or several that differ only in the order of their sums.

    Infinite entries (the lse of a query that sees no key) must agree exactly; a NaN is an infinite error.
    """
    if actual.shape != gold.shape:
        raise ValueError(f"a result of shape {tuple(actual.shape)} cannot be judged against {tuple(gold.shape)}")
    if not gold.numel():
        return Verdict(0.0, 0.0)
    finite = gold.isfinite()
    if not torch.equal(actual[~finite].double(), gold[~finite].double()):
        return Verdict(float("inf"), 0.0)
    reference = gold[finite].double()
    if not reference.numel():
        return Verdict(0.0, 0.0)

    def error(result: Tensor) -> float:
        difference = (result[finite].double() - reference).abs()
        return torch.where(difference.isnan(), torch.inf, difference).max().item()

    ulp = torch.finfo(actual.dtype).eps * reference.abs().max().item()
    orders = [eager] if isinstance(eager, Tensor) else eager
    return Verdict(error(actual), factor * max(error(result) for result in orders) + ulp)


def in_a_line(error: BaseException) -> str:
    """An error's type and the first line of its message, which from a compiler has hundreds."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def is_lost(device: torch.device | str) -> bool:
    """Whether this process can use `device` no more: after a fault on a GPU every later call fails like the first."""
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def poison_empty(monkeypatch_setattr: object) -> None:
    """Makes `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return NaN, or a huge integer, so that an
    unwritten element shows. Takes pytest's `monkeypatch.setattr`."""
    setattr_ = monkeypatch_setattr
    assert callable(setattr_)

    def poisoned(make: object) -> object:
        assert callable(make)

        def wrapper(*args: object, **kwargs: object) -> Tensor:
            result: Tensor = make(*args, **kwargs)
            if result.dtype.is_floating_point:
                return result.fill_(torch.nan)
            return result if result.dtype == torch.bool else result.fill_(torch.iinfo(result.dtype).max // 3)

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr_(owner, name, poisoned(getattr(owner, name)))


class Layout(NamedTuple):
    """A packed row: its length, image spans, document lengths, indices of hidden images."""

    length: int
    images: Sequence[tuple[int, int]]
    documents: Sequence[int] | None = None
    hidden: Sequence[int] = ()

    def mask(self, device: torch.device | str | None = None) -> IntervalMask:
        """The layout as an `IntervalMask` of one row."""
        return IntervalMask.from_spans(self.length, self.images, self.documents, self.hidden, device)


# The layouts that broke other implementations of this mask; tiles in the tests are 16 to 64 wide.
LAYOUTS: dict[str, Layout] = {
    "text_only": Layout(70, []),
    "image_only": Layout(70, [(0, 70)]),
    "single_token": Layout(1, []),
    "single_image_token": Layout(1, [(0, 1)]),
    "image_longer_than_a_tile": Layout(150, [(9, 140)]),
    "image_straddles_tiles": Layout(100, [(60, 70)]),
    "adjacent_images": Layout(90, [(5, 40), (40, 75)]),
    "image_at_both_ends": Layout(97, [(0, 33), (64, 97)]),
    "document_boundary_in_tile": Layout(120, [(10, 20), (60, 110)], [45, 75]),
    "one_token_documents": Layout(37, [(20, 30)], [1] * 20 + [10] + [1] * 7),
    "hidden_image": Layout(130, [(10, 50), (52, 92)], [110, 20], [0]),
    "odd_length": Layout(113, [(3, 7), (50, 101)]),
}


def random_layout(rng: random.Random, length: int) -> Layout:
    """A random row of `length` tokens: documents, and in each of them images side by side or apart, some hidden."""
    documents: list[int] = []
    images: list[tuple[int, int]] = []
    hidden: list[int] = []
    start = 0
    while start < length:
        size = rng.randint(1, length - start)
        position = start
        while position < start + size:
            position += rng.choice([0, 0, rng.randint(0, size)])
            stop = min(start + size, position + rng.randint(1, size))
            if position < stop and rng.random() < 0.6:
                if rng.random() < 0.2:
                    hidden.append(len(images))
                images.append((position, stop))
            position = max(stop, position + 1)
        documents.append(size)
        start += size
    return Layout(length, images, documents, hidden)
