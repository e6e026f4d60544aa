"""Checks of a user's arguments; each error names the argument, its value and what is wanted."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from transfusion.kernels.registry import whole


def real(name: str, given: Any) -> float:
    """`given` as a float. Raises `TypeError` for what is no number, `ValueError` for one beyond all floats."""
    try:
        if isinstance(given, str | bytes):
            raise TypeError
        return float(given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={given!r} must be a number, got {type(given).__name__}") from error
    except OverflowError as error:
        raise ValueError(f"{name} is a whole number beyond all floats; give a smaller one") from error


def sides(given: Any) -> tuple[int, ...]:
    """A latent_shape as ints. Raises `TypeError` for what is none."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"latent_shape={given!r} must be (C, h, w), got {type(given).__name__}")
    return tuple(whole("a side of latent_shape", side) for side in given)


def of_kind(name: str, given: Any, kind: type) -> None:
    """Raises `TypeError` unless `given` is a `kind`."""
    if not isinstance(given, kind):
        raise TypeError(f"{name}={given!r} must be a {kind.__name__}, got {type(given).__name__}")


def function(name: str, given: Any) -> None:
    """Raises `TypeError` unless `given` can be called, or is None."""
    if given is not None and not callable(given):
        raise TypeError(f"{name}={given!r} must be a function or None, got {type(given).__name__}")


def seed_of_64_bits(given: Any) -> int:
    """A seed as an int, whatever kind of whole number it is. Raises `TypeError`, or `ValueError` beyond 64 bits."""
    seed = whole("seed", given)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must be of 64 bits: within {-(2**63)}..{2**63 - 1}")
    return seed


def check_token_ids(name: str, given: Any) -> None:
    """Raises `TypeError` or `ValueError` unless `given` is a tensor (n,) of whole numbers."""
    if not isinstance(given, Tensor) or given.dtype.is_floating_point or given.dtype == torch.bool:
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name} must be a tensor of token ids, int64, got {kind}; torch.tensor([...]) makes one")
    if given.ndim != 1:
        raise ValueError(f"{name} must have one dimension, (n,), got shape {tuple(given.shape)}")
