"""Read parts of a file into memory of the caller, past the page cache if the system allows it."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from peftfx.memory.pages import PAGE


class DirectFile:
    """A file whose parts are read once, with direct I/O if the file system has it.

    A weight that is read once, into memory that is used again for the next weight, needs no page of the cache. Filling
    the cache would cost more than reading, and would drop pages that other work needs.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = _open_direct(path)
        except OSError:  # the file system has no direct I/O, or there is no such file
            self._file = io.FileIO(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read_into(self, view: memoryview, offset: int, length: int) -> memoryview:
        """Read `length` bytes from `offset` on, and return where in `view` they are.

        Args:
            view: memory that starts on a page, of at least `span_of(offset, length)` bytes.
            offset: the position of the first byte in the file.
            length: the number of bytes.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        before, wanted = offset % PAGE, offset % PAGE + length
        target, filled = view[: span_of(offset, length)], 0
        self._file.seek(offset - before)
        while filled < wanted:
            read = self._read(target[filled:])
            if not read:
                raise OSError(errno.EIO, f"the file ends within the {length:,} bytes from {offset:,} on")
            filled += read
        return view[before:wanted]

    def _read(self, target: memoryview) -> int:
        try:
            return self._file.readinto(target) or 0
        except OSError as error:
            if error.errno != errno.EINVAL:  # a direct read is invalid if the disk's blocks are larger than a page
                raise
            position = self._file.tell()
            self._file.close()
            self._file = io.FileIO(self._path)
            self._file.seek(position)
            return self._file.readinto(target) or 0


def span_of(offset: int, length: int) -> int:
    """Return how many bytes the whole pages have in which these bytes of a file are."""
    return -(-(offset % PAGE + length) // PAGE) * PAGE


def _open_direct(path: Path) -> io.FileIO:
    return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_DIRECT", 0)))
