"""A fresh seed for every test, which a failing assertion prints; and a folder of data."""

import random
from pathlib import Path

import pytest
import tiny


@pytest.fixture
def seed() -> int:
    return random.randrange(2**62)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.data_folder(tmp_path / "data")
