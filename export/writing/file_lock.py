"""A lock on a directory, held through an open file in it. The system releases the lock when its holder dies.

The lock works across containers and process ids.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from peftfx.errors import PeftfxError

_FILE = "lock"


@contextlib.contextmanager
def locked(directory: Path, target: Path) -> Iterator[None]:
    """Make `directory`, and hold its lock exclusively. At the end it is removed if it is empty.

    Args:
        directory: the directory for the holder's own files.
        target: the path that the holder writes, for messages.

    Raises:
        PeftfxError: another thread or process holds the lock.
        OSError: the directory cannot be made.
    """
    path = directory / _FILE
    file = _take(directory, path, target)
    try:
        yield
    finally:
        if _windows():  # Windows cannot remove an open file; elsewhere, a closed file may already be another holder's
            os.close(file)
        with contextlib.suppress(OSError):
            path.unlink()
        if not _windows():
            os.close(file)
        with contextlib.suppress(OSError):
            directory.rmdir()


def _take(directory: Path, path: Path, target: Path) -> int:
    while True:
        made = _make(directory)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # the last holder has just removed it
            continue
        try:
            free = _try_lock(file)
        except OSError:  # a file system without locks: an existing directory may have a live writer
            free = made
        if not free:
            os.close(file)
            hint = f"wait for it, or choose another output; if none is running, delete {directory}"
            raise PeftfxError("another run is writing there", str(target), hint)
        if _windows() or _is_at(path, file):  # on Windows an open file cannot be removed
            return file
        os.close(file)  # the last holder removed the file before this lock was taken


def _make(directory: Path) -> bool:
    """Make a directory, and say whether it is new."""
    try:
        directory.mkdir()
        return True
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # removed in between
            if not stat.S_ISDIR(os.lstat(directory).st_mode):
                what, hint = "an export keeps its files here, and this is no directory", "move it away"
                raise PeftfxError(what, str(directory), hint) from None
        return False


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _windows() -> bool:
    return sys.platform == "win32"


def _try_lock(file: int) -> bool:
    """Lock an open file without waiting, and say whether this succeeded."""
    try:
        if sys.platform == "win32":  # as mypy reads it
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True
