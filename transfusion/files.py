"""Files that are there whole or not at all."""

import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes aside, then renames: where the disk is full, or the process killed, what was there still is.

    Text is UTF-8. Half of a surrogate pair, of a file's name that is no Unicode, is written as JSON escapes it.
    """
    path = Path(os.path.realpath(path))  # a link goes on to point at it
    aside = path.with_name(f"{path.name}.tmp")
    try:
        aside.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        if path.exists():
            shutil.copymode(path, aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
