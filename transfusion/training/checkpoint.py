"""A checkpoint is written aside, forced to disk, then renamed: whatever happens, the last whole one is still there."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8})\.pt")


class Checkpoints:
    """The checkpoints `step-00001000.pt`, ... in one folder, of which the last `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes `state`. Raises `OSError` saying which checkpoint survives where the disk is full or broken."""
        path = self.folder / f"step-{step:08d}.pt"
        aside = path.with_suffix(".pt.tmp")
        try:
            with open(aside, "wb") as file:
                torch.save({"step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a short write into RuntimeError
            aside.unlink(missing_ok=True)
            last = self.paths()[-1] if self.paths() else "none"
            raise OSError(f"cannot write {path}: {error}; the last whole checkpoint is {last}") from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load_last(self, device: torch.device) -> dict[str, Any] | None:
        """The newest state, or None where there is none. Raises `ValueError` naming a file that cannot be read."""
        if not self.paths():
            return None
        path = self.paths()[-1]
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
            raise ValueError(
                f"{path} is truncated or no checkpoint ({error}); delete it to go on from the one before"
            ) from error
        return state
