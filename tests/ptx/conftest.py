"""Kernels as they ship: compiled for a GPU, and what was compiled executed by `ptx_machine`, on a CPU.

    TRITON_INTERPRET=0 python -m pytest tests/ptx

In a process under Triton's interpreter, as the other tests are on a CPU, nothing is compiled: there this folder is not
collected. A test has a fresh seed, of its inputs and of the order of events, and prints it.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfusion.kernels.registry import TRITON_INTERPRET

sys.path.insert(0, str(Path(__file__).parent))  # `import playing, ptx_machine`

collect_ignore_glob = ["test_*.py"] if TRITON_INTERPRET else []


@pytest.fixture
def seed() -> int:
    number = random.randrange(10**6)
    print("seed", number)  # shown where a test fails
    return number


@pytest.fixture
def device(seed: int) -> Iterator[None]:
    """impl="triton" runs on the machine, as on an sm_90."""
    from playing import playing

    with playing(90, seed):
        yield
