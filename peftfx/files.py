"""File access: files are written completely or not at all, and changes during reading are noticed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from peftfx.errors import PeftfxError

_DEEPEST = 100  #: the most levels of a JSON file: recursive code would run out of stack on a deeper one
_ADVICE = {
    errno.ENOENT: "make its folder first",
    errno.EEXIST: "a file has this name: choose another path",
    errno.ENOTDIR: "a part of this path is a file: choose another path",
    errno.EISDIR: "this is a directory: give the path of a file in it",
    errno.EACCES: "choose a directory that you may write to",
    errno.ENOSPC: "free some space, or choose a directory on another disk",
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.ENAMETOOLONG: "choose a shorter name",
}

_OF_THE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  #: errors of the path that was given


def is_file(path: Path) -> bool:
    """Return whether there is a file at this path; false for a path that no file can have (too long, for example)."""
    return os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Return whether there is a directory at this path; false for a path that no directory can have."""
    return os.path.isdir(path)


def require_readable(path: Path) -> None:
    """Refuse a file that cannot be opened: safetensors says of one without the right to read it that there is none.

    Raises:
        PeftfxError: it cannot be opened.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        hint = "check the path, and that you may read the file"
        raise PeftfxError(f"cannot be read: {error.strerror or error}", str(path), hint) from error


def read_json(path: Path, hint: str = "download the file again") -> dict[str, object]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        hint: what the user can do if the file is broken.

    Raises:
        PeftfxError: the file cannot be read, is not JSON, is not an object, or is nested too deeply.
    """
    found = _read(path, hint)
    if not isinstance(found, dict):
        raise PeftfxError("not a JSON object", str(path), hint)
    return found


def read_objects(path: Path) -> list[dict[str, object]]:
    """Return the list of objects in a JSON file; the errors are those of `read_json`."""
    hint = "download the file again"
    found = _read(path, hint)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise PeftfxError("not a list of JSON objects", str(path), hint)
    return found


def _read(path: Path, hint: str) -> object:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeftfxError(f"cannot be read: {error.strerror or error}", str(path), "check the path") from error
    except ValueError as error:
        raise PeftfxError(f"not valid JSON: {error}", str(path), hint) from error
    except RecursionError as error:
        raise PeftfxError("nested too deeply", str(path), hint) from error
    if _is_deep(found):
        raise PeftfxError("nested too deeply", str(path), hint)
    return found


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = (list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [item for items in inner for item in items]
    return bool(level)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors in the `with` block into PeftfxErrors about `path`.

    Errors that other code raises there, such as the code of a model that an export runs, pass as they are. Those
    of libraries in Rust, such as safetensors, tell the system's errors in words of their own.
    """
    with contextlib.suppress(OSError):  # there need be nothing yet
        try:
            os.lstat(path)
        except ValueError as error:  # a path that no file system takes
            raise PeftfxError(f"cannot write: {error}", str(path), "choose another path") from error
    try:
        yield
    except Exception as error:
        number = errno_in(error)
        if number is None:  # not the system's
            raise
        reason = error.strerror if isinstance(error, OSError) else os.strerror(number)
        named = None if number in _OF_THE_PATH else getattr(error, "filename", None)  # not of the temporary file there
        raise PeftfxError(f"cannot write: {reason or error}", str(named or path), _ADVICE.get(number, "")) from error


@contextlib.contextmanager
def folder_of(path: Path) -> Iterator[None]:
    """Make the folder of `path`, and those above it. After an error in the `with` block, those it made are removed.

    A folder that something has been put into stays.
    """
    made = [folder for folder in path.parents if not os.path.lexists(folder)]  # the deepest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty, or was not made
                folder.rmdir()
        raise


def errno_in(error: BaseException) -> int | None:
    """Return the number of the system's error that an error tells of, or None."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def write_file(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` make a temporary file in the folder of `path`, then move that file to `path`.

    Raises:
        PeftfxError: there is a file at `path` by now, and `replace` is false.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _place(temporary: Path, path: Path) -> None:
    """Move a file to a path where no file may be; of two processes that try, only one succeeds."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise already_there(path) from error
    except OSError as error:  # no hard links on this file system
        if os.path.lexists(path):
            raise already_there(path) from error
        os.replace(temporary, path)


def already_there(path: Path) -> PeftfxError:
    """Return the error for an output that exists already and may not be replaced."""
    return PeftfxError("the output exists already", str(path), "pass --force (force=True) to replace it")


class Snapshot:
    """The state of the files in some directories, to notice later whether a file has changed."""

    def __init__(self, *directories: Path) -> None:
        self._directories = directories
        self._seen = self._look()

    def _look(self) -> dict[Path, tuple[int, int, int]]:
        found = {}
        for directory in filter(is_folder, self._directories):
            try:
                for path in filter(is_file, sorted(directory.iterdir())):
                    status = path.stat()
                    found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
            except OSError as error:
                what = f"cannot be read: {error.strerror or error}"
                raise PeftfxError(what, str(directory), "check the path") from error
        return found

    def check(self) -> None:
        """Raise if a file has changed or disappeared since the snapshot."""
        now = self._look()
        changed = [str(path) for path, status in self._seen.items() if now.get(path) != status]
        if changed:
            raise PeftfxError("it changed while it was read", ", ".join(changed[:3]), "run the export again")


def is_gguf(path: Path) -> bool:
    """Return whether a file has the GGUF format, llama.cpp's format of models."""
    if not is_file(path):
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"
