"""Files: written so that nothing half-written is left, and read so that a change underneath is noticed."""

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


class Snapshot:
    """What the files of some directories were like, to tell later whether any changed."""

    def __init__(self, *directories: Path) -> None:
        self._directories = directories
        self._seen = self._look()

    def _look(self) -> dict[Path, tuple[int, int, int]]:
        found = {}
        for path in sorted(p for d in self._directories if d.is_dir() for p in d.iterdir() if p.is_file()):
            status = path.stat()
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found

    def check(self) -> None:
        """Raise if one of them changed or went away since."""
        now = self._look()
        changed = [str(path) for path, status in self._seen.items() if now.get(path) != status]
        if changed:
            raise PeftfxError("it changed while it was read", ", ".join(changed[:3]), "run the export again")


def is_gguf(path: Path) -> bool:
    """Whether this is a file in GGUF, llama.cpp's format of a model."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"
