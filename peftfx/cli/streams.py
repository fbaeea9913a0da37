"""The streams that a command speaks on: they take any text, and one that cannot be written is told once."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

from peftfx.errors import PeftfxError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def take_any_text() -> None:
    """Let stdout and stderr take any text, so that saying what was done never fails.

    A closed one is put on the null device: a file that is written would get its number otherwise. A letter that is not
    in the encoding of one is written as its escape.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Write what stdout still holds at the end of this context, and refuse a stdout whose disk is full.

    Raises:
        PeftfxError: stdout cannot take more. What is said behind it goes to the null device, or Python would try again.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        hint = "free some space, or write it to another disk"
        raise PeftfxError(f"cannot be written: {error.strerror}", "stdout", hint) from error
