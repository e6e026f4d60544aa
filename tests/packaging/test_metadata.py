"""setup.py, the constraints and the imports of the code agree with each other."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from itertools import chain

import pytest

PACKAGE_FOLDERS = ("kernels", "transfusion")


def imported_names(source):
    """The top-level names that a module imports absolutely, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement):
    return normalised(re.match(r"[\w.-]+", requirement)[0])


@pytest.fixture(scope="module")
def setup_arguments(root, monkeypatch_module):
    """The keyword arguments that setup.py hands to `setuptools.setup`."""
    import setuptools

    caught = {}
    monkeypatch_module.setattr(setuptools, "setup", caught.update)
    monkeypatch_module.chdir(root)
    exec(compile((root / "setup.py").read_text(encoding="utf-8"), "setup.py", "exec"), {"__name__": "__main__"})
    return caught


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def pins(root):
    """name -> the whole line, for each line of constraints.txt."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {requirement_name(line): line for line in lines if line and not line.startswith("#")}


def test_setup_imports_only_setuptools(root):
    assert imported_names((root / "setup.py").read_text(encoding="utf-8")) == {"setuptools"}


def test_every_direct_dependency_is_pinned(setup_arguments, pins):
    required = chain(setup_arguments["install_requires"], *setup_arguments["extras_require"].values())
    direct = {requirement_name(line) for line in required if "python_version < " not in line}
    assert direct == set(pins)
    assert all("==" in line for line in pins.values())


def test_tested_torch_and_triton(pins):
    assert pins["torch"].startswith("torch==2.13.0")
    assert pins["triton"].startswith("triton==3.7.1")


def test_extras_contain_each_other(setup_arguments):
    extras = {name: set(requirements) for name, requirements in setup_arguments["extras_require"].items()}
    assert set(extras) >= {"train", "demo", "hub", "eval", "bench", "dev"}
    assert extras["train"] < extras["demo"] < extras["dev"]
    assert all(extras[name] < extras["dev"] for name in ("bench", "hub", "eval"))


def test_every_import_is_a_declared_dependency(root, python_files, setup_arguments):
    """Weights & Biases alone is declared nowhere: who logs to it has it."""
    extras = (lines for name, lines in setup_arguments["extras_require"].items() if name != "dev")
    declared = set(map(requirement_name, chain(setup_arguments["install_requires"], *extras))) | {"wandb"}
    distributions = packages_distributions()
    undeclared = {}
    for path in python_files:
        if path.parts[0] not in PACKAGE_FOLDERS:
            continue
        names = imported_names((root / path).read_text(encoding="utf-8")) - sys.stdlib_module_names - {"transfusion"}
        missing = {n for n in names if not declared & {n, *map(normalised, distributions.get(n, []))}}
        if missing:
            undeclared[str(path)] = missing
    assert undeclared == {}
