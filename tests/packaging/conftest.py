"""What the packaging tests share: the files of the repository, a copy of them, and a clean subprocess."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def repository_files() -> list[Path]:
    """Every file that git tracks, or would on `git add --all`, relative to the root; links are listed, not followed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the files that belong to the repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in listing.stdout.split("\0") if name]
    return sorted({name for name in files if (ROOT / name).exists()})


@pytest.fixture(scope="session")
def python_files(repository_files: list[Path]) -> list[Path]:
    """The Python files among them."""
    return [name for name in repository_files if name.suffix == ".py"]


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command whose Python sees the installed packages and nothing that this process was told to add."""

    def run_command(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON_", "TRANSFUSION_"))}
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
        if check and done.returncode:
            pytest.fail(f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run_command


@pytest.fixture(scope="session")
def run_python(run: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -c code` in a clean environment."""

    def run_code(
        code: str, cwd: Path, python: str | Path = sys.executable, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return run(python, "-c", code, cwd=cwd, check=check)

    return run_code
