"""Files that are written whole or not at all, and folders that one process has to itself."""

import contextlib
import errno
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK = "in-use.lock"
_HELD: set[str] = set()  # held by this process, which the system's locks do not stop


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes under another name, then renames: on a full disk, or if the process is killed, the old file is still
    there.

    Text is UTF-8. An unpaired surrogate, from a file name that is not Unicode, is written in JSON's escaped form.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing at it
    aside = path.with_name(f"{path.name}.tmp")
    try:
        aside.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        if path.exists():
            shutil.copymode(path, aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds `folder`, made if need be, so that no other process enters it; a folder that stays empty is removed.

    The system releases it when the process dies, however it dies. Raises `ValueError` where another process is in it.
    Without file locks nothing is held: a file system without them is warned about, and Windows never has them.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    place = os.path.realpath(folder)
    if place in _HELD:
        raise ValueError(_in_use(folder, "by this process"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _HELD.add(place)
        with _locked(folder / LOCK):
            yield
    finally:
        _HELD.discard(place)
        for path in takewhile(lambda path: path != there, (folder, *folder.parents)):
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a forked child would keep holding
            except OSError as error:
                _refuse(path.parent, file, error)
            if not _is_at(file, path):  # its holder has just removed it
                continue
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _refuse(folder: Path, file: IO[str], error: OSError) -> None:
    """Raises `ValueError` if another process holds the lock; warns where there are no locks."""
    if error.errno not in (errno.EACCES, errno.EAGAIN):
        logger.warning("%s cannot be locked (%s): see that no other process writes there", folder, error.strerror)
        return
    file.seek(0)
    raise ValueError(_in_use(folder, f"by another process ({file.read() or 'no more is known'})"))


def _in_use(folder: Path, by: str) -> str:
    return f"{folder} is in use {by}; wait for it or stop it, or give another folder"


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
