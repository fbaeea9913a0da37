"""A file that is written once, from front to back, past the page cache if the system allows it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from peftfx.memory.pages import PAGE, page_memory

_BUFFER = 4 << 20


class Stream:
    """A new file that is written once, from front to back, with direct I/O if the file system has it.

    With direct I/O the kernel neither copies nor caches what is written. A model's weights are read later, by other
    processes, and the copies would cost more than all the arithmetic of a merge. On a file system without direct I/O,
    writes are ordinary.

    Raises:
        OSError: the disk refuses, or is full.
    """

    def __init__(self, path: Path) -> None:
        self.position = 0
        self._buffer = page_memory(_BUFFER)
        self._filled = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        direct = getattr(os, "O_DIRECT", 0)
        try:
            self._file, self._direct = os.open(path, flags | direct, 0o666), bool(direct)
        except OSError:
            self._file, self._direct = os.open(path, flags, 0o666), False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._file)
            with contextlib.suppress(BufferError):  # an error's traceback may still hold the buffer, and frees it later
                self._buffer.close()

    def pad(self, offset: int) -> None:
        """Write zeros up to `offset`."""
        self.write(memoryview(bytes(offset - self.position)))

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        data = data.cast("B") if data.nbytes else data
        self.position += data.nbytes
        while data.nbytes:
            if self._filled == 0 and (whole := self._direct_length(data)):
                self._put(data[:whole])
                data = data[whole:]
                continue
            part = min(data.nbytes, _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + part] = data[:part]
            self._filled += part
            data = data[part:]
            if self._filled == _BUFFER or (self._filled % PAGE == 0 and data.nbytes == 0):
                self._flush()

    def _direct_length(self, data: memoryview) -> int:
        """Return how many bytes of `data` can be written directly from their memory."""
        if not self._direct:
            return data.nbytes
        aligned = not data.readonly and ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE == 0
        return data.nbytes - data.nbytes % PAGE if aligned else 0

    def _flush(self) -> None:
        with memoryview(self._buffer) as view, view[: self._filled] as filled:
            self._put(filled)
        self._filled = 0

    def _put(self, data: memoryview) -> None:
        while data.nbytes:
            try:
                done = os.write(self._file, data)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._go_ordinary()
                continue
            data = data[done:]

    def _go_ordinary(self) -> None:
        """Write through the page cache from now on.

        A direct write is invalid if the disk or a limit stopped the last write within a page, or if the disk's blocks
        are larger than a page. An ordinary write then succeeds, or says what is wrong.
        """
        import fcntl

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    def _finish(self) -> None:
        """Write the rest. Direct writes are whole pages, so the file is cut to its size afterwards."""
        if self._filled:
            self._filled += -self._filled % PAGE if self._direct else 0
            self._flush()
        os.ftruncate(self._file, self.position)
        os.fsync(self._file)
