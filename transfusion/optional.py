"""`require(name)` imports an optional dependency where it is used, or says which extra brings it."""

import importlib
from types import ModuleType


def require(name: str, extra: str = "demo") -> ModuleType:
    """-> the module `name`. Raises `ImportError` that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): pip install transfusion-kernels[{extra}]") from error
