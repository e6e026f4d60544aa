"""A fresh seed for every test; a failing assertion prints it."""

import random

import pytest


@pytest.fixture
def seed() -> int:
    return random.randrange(2**62)
