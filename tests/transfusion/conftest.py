"""A fresh seed for every test, which a failing assertion prints; and a folder of data."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture
def seed() -> int:
    return random.randrange(2**62)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.data_folder(tmp_path / "data")


@contextmanager
def _elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def elsewhere() -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch's default device is another than the host, and has no numbers."""
    return _elsewhere
