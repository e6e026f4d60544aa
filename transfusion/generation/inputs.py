"""The arguments of a pipeline call, row by row, and its output."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from transfusion.data import Tokenizer
from transfusion.generation.arguments import seed_of_64_bits

_OUTPUTS = ("image", "text", "both")
_LARGEST_SEED = 2**62


@dataclass(frozen=True)
class PipelineOutput:
    """The output of a call, for each of its rows in order.

    images          of all rows, one after the other: PIL images, or for output_type "pt" a tensor (I, 3, H, W) in
                    [0, 1], for "latent" (I, C, h, w)
    text            of each row what was written, one string
    documents       of each row what was written and drawn, in turn: strings, and indices into `images`
    logprobs        of each row the log-probabilities (T,) of the tokens it drew
    finish_reasons  of each row, as `Generation` tells them
    """

    images: Any
    text: list[str]
    documents: list[list[str | int]]
    logprobs: list[Tensor]
    finish_reasons: list[str]


@dataclass(frozen=True)
class Row:
    """One requested document: its context, and what is to follow."""

    prompt: str | None
    image: Any
    mask_image: Any
    output: str


def rows_of(prompt: Any, image: Any, mask_image: Any, output: Any) -> list[Row]:
    """The arguments of a call, each for all rows or a list with one for each -> rows.

    Raises `ValueError` where the lists differ in length, where a row has nothing to continue, or an empty prompt.
    """
    given = {"prompt": prompt, "image": image, "mask_image": mask_image, "output": output}
    lengths = {name: len(value) for name, value in given.items() if _is_column(value)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists of different lengths, {lengths}; give one entry for each row")
    count = next(iter(lengths.values()), 1)
    if not count:
        raise ValueError(f"{' and '.join(lengths)} is an empty list: give at least one prompt or image")
    columns = [value if name in lengths else [value] * count for name, value in given.items()]
    return [_row(index, *row) for index, row in enumerate(zip(*columns, strict=True))]


def _is_column(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _row(index: int, prompt: str | None, image: Any, mask_image: Any, output: str | None) -> Row:
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt {index} must be a string or None, got {type(prompt).__name__}")
    if prompt is not None and not prompt.strip():
        raise ValueError(f"prompt {index} is empty; give a text, or None for an output that nothing is said about")
    if prompt is None and image is None and output is None:
        raise ValueError(f"row {index} has neither prompt nor image; give one, or say which output is wanted")
    chosen = output or ("text" if prompt is None and mask_image is None else "image")
    if chosen not in _OUTPUTS:
        raise ValueError(f"output={output!r} of row {index} is unknown; choose one of {', '.join(_OUTPUTS)}")
    if mask_image is not None and (image is None or chosen != "image"):
        raise ValueError(
            f"mask_image of row {index} is a part of an image to paint anew: it needs image=, output='image'"
        )
    return Row(prompt, image, mask_image, chosen)


def seeds_of(seed: Any, generator: Any, rows: int) -> list[int]:
    """One seed for each row: drawn from the generators where there are any, else `seed` and those after it.

    Raises `ValueError` for another number of seeds or generators than rows, or a seed that is none of 64 bits, and
    `TypeError` for what is no whole number.
    """
    if generator is not None:
        own = list(generator) if isinstance(generator, Sequence) else [generator] * rows
        wrong = [each for each in own if not isinstance(each, torch.Generator)]
        if wrong:
            raise TypeError(f"generator={wrong[0]!r} must be a torch.Generator, or a list with one for each row")
        _check_count("generators", len(own), rows)
        return [int(torch.randint(_LARGEST_SEED, (), generator=each, device=each.device)) for each in own]
    if hasattr(seed, "__len__") and not isinstance(seed, str) and getattr(seed, "ndim", 1) != 0:
        _check_count("seeds", len(seed), rows)
        return [seed_of_64_bits(each) for each in seed]
    first = seed_of_64_bits(seed)
    return [seed_of_64_bits(first + index) for index in range(rows)]


def _check_count(name: str, count: int, rows: int) -> None:
    if count != rows:
        raise ValueError(f"{count} {name} for {rows} rows; give one, or one for each row")


class StopStrings:
    """The strings at which a text ends.

    Raises `ValueError` for an empty one, at which every text would, and `TypeError` for what is no string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]) -> None:
        given: tuple[Any, ...] = tuple(stop) if _is_column(stop) else (stop,)
        if not all(isinstance(each, str) for each in given):
            raise TypeError(f"stop={stop!r} must be a string or a list of strings; () is none")
        strings: tuple[str, ...] = given
        if not all(strings):
            raise ValueError("a stop string is empty; every text would end at it")
        self._tokenizer, self.strings = tokenizer, strings
        # a token says at least one byte, but for the special ones: within so many others a string lies
        self._reach = max((len(string.encode()) for string in strings), default=0)
        self._silent = frozenset(astuple(tokenizer.special))

    def reached(self, token_ids: Sequence[int]) -> bool:
        """Whether the last tokens say one of the strings."""
        speaking = (token for token in reversed(token_ids) if token not in self._silent)
        tail = self._tokenizer.decode(list(islice(speaking, self._reach))[::-1])
        return any(string in tail for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((text.index(string) for string in self.strings if string in text), default=len(text))]
