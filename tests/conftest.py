"""Without a GPU the Triton kernels run under the interpreter, which must be chosen before triton is imported."""

import os
import sys
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("TRANSFUSION_CACHE", tempfile.gettempdir() + "/transfusion-tests")  # drawn emoji
# What inductor keeps of a graph is not told that an op of another version of this library returned another shape.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "inductor"))

sys.path.insert(0, str(Path(__file__).parent / "transfusion"))  # `import tiny`
sys.path.insert(0, str(Path(__file__).parent / "distributed"))  # `import launch, scenarios`

import transfusion  # noqa: F401  before any test imports diffusers: in the root `kernels` would be taken for another package
