"""Writing files so that nothing half-written is left: beside the target first, then moved into place."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from peftfx.errors import PeftfxError

_ADVICE = {
    13: "choose a directory that you may write to",
    28: "free some space, or choose a directory on another disk",
    30: "the file system is read-only: choose another directory",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into PeftfxErrors about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise PeftfxError(
            f"cannot write: {reason}", str(error.filename or path), _ADVICE.get(error.errno or 0, "")
        ) from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then move it there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
