"""Keeps the folder `kernels` of a checkout from being found as Hugging Face's package of that name.

Python started in the repository root (`python -m ...`) has that root on `sys.path`. transformers and diffusers, which
look for a package `kernels`, would find this folder there and end with the ImportError that it raises under its bare
name.
"""

import os
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def keep() -> None:
    """Makes `import kernels` skip the repository root from now on: it finds the other package, or none."""
    root = Path(__file__).resolve().parents[1]
    for entry in {str(root), *(entry or os.getcwd() for entry in sys.path)}:
        if Path(entry).resolve() == root:
            _hide(entry)


def _hide(entry: str) -> None:
    finder = pkgutil.get_importer(entry)  # the one object that every later import asks about this entry
    if finder is None:
        return
    find = finder.find_spec

    def find_spec(name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if name == "kernels" else find(name, target)

    finder.find_spec = find_spec  # type: ignore[method-assign]
