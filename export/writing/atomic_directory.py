"""Write a directory beside its target, and move it into place when it is complete."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from peftfx.errors import PeftfxError
from peftfx.export.writing.earlier_output import FilesOf, of_export, refuse_standing
from peftfx.export.writing.file_lock import locked
from peftfx.files import already_there, folder_of, writing

_NEW, _OLD = "new", "old"
_OF_FILES = (".onnx", ".safetensors")  #: ends of names of files; exporters that write one file take such paths
_RESERVE = 16 << 20  #: bytes of address space that are reserved for the clean-up


@contextlib.contextmanager
def publish(directory: str | Path, force: bool = False, made: FilesOf = of_export) -> Iterator[Path]:
    """Yield a temporary directory. On success it becomes `directory`; on any exception it is removed.

    Until then the folder `.NAME.peftfx` stands beside `directory`, and is locked: a second process that writes to the
    same place is refused. What a killed run left there is removed, or put back if the kill came between the two moves.

    Args:
        directory: the directory to write.
        force: replace an existing directory, only after success.
        made: returns what an earlier command wrote there, which may be replaced. An empty directory always may.

    Raises:
        PeftfxError: for the reasons of `check_output`; another process is writing there; or the disk refuses (no space,
            no permission, ...).
    """
    target = _safe(directory)
    area = target.with_name(f".{target.name}.peftfx")
    with writing(target), folder_of(target), locked(area, target):
        _recover(area, target, made)
        refuse_standing(target, force, made)
        reserve = mmap.mmap(-1, _RESERVE)  # pages of its own: memory that python frees is not always given back
        try:
            (area / _NEW).mkdir()
            yield area / _NEW
            refuse_standing(target, force, made)  # again, as minutes have passed
            _move(area, target)
            _remove(area / _OLD)
        except MemoryError:
            gc.collect()  # commands look for garbage rarely
            raise
        finally:
            reserve.close()  # if memory has run out: listing a directory needs some
            _recover(area, target, made)


def check_output(directory: str | Path, force: bool, made: FilesOf = of_export) -> None:
    """Refuse an output directory that must not be written.

    Raises:
        PeftfxError: the directory exists, and `force` is not set, or no export made it (see `made`), or it has files
            that were added since; or it is a link; or it is, or holds, the working directory or the user's home; or it
            is new, and its name is a file's, as in out.onnx.
    """
    refuse_standing(_safe(directory), force, made)


def _safe(directory: str | Path) -> Path:
    with writing(Path(directory)):
        target = _resolved(Path(directory))
    for place, what in _homes():
        if any(_same(target, above) for above in (place, *place.parents)):
            is_it = "is" if _same(target, place) else "holds"
            hint = "name a directory to make, as in --output out"
            raise PeftfxError(f"the output {is_it} {what}", str(target), hint)
    above = next(path for path in target.parents if os.path.lexists(path))
    if not above.is_dir():
        raise PeftfxError("the output would be in a file, which is no directory", str(above), "choose another output")
    if target.suffix in _OF_FILES and not target.is_dir():
        hint = f"name a directory, as in {target.stem}: the files are written in it"
        raise PeftfxError(f"the output is a directory, but its name ends in {target.suffix}", str(target), hint)
    if os.path.islink(target):
        raise PeftfxError("the output is a link", str(target), "pass the directory that it leads to, or remove it")
    return target


def _resolved(directory: Path) -> Path:
    """Return an absolute path. Only its last part may still be a link."""
    if directory.name in ("", ".."):
        return Path(os.path.realpath(directory))
    return Path(os.path.realpath(directory.parent)) / directory.name


def _homes() -> Iterator[tuple[Path, str]]:
    yield Path.cwd(), "the working directory"
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path(os.path.realpath(Path.home())), "your home directory"


def _same(one: Path, other: Path) -> bool:
    """Say whether two paths are the same directory, however they are written."""
    try:
        return one == other or (not os.path.islink(one) and os.path.samefile(one, other))
    except (OSError, ValueError):  # ValueError: no file system allows such a path
        return False


def _move(area: Path, target: Path) -> None:
    """Move the new directory to the target. The old one is moved aside first: it cannot be replaced if it has files."""
    if os.path.lexists(target):
        os.rename(target, area / _OLD)
    try:
        os.rename(area / _NEW, target)
    except OSError as error:
        if os.path.lexists(target):  # made by another process since the last check
            raise already_there(target) from error
        raise


def _recover(area: Path, target: Path, made: FilesOf) -> None:
    """Move the old directory back if nothing replaced it, and remove the rest."""
    old = area / _OLD
    if old.exists():
        if not os.path.lexists(target):
            os.rename(old, target)
        elif made(target) is None:
            hint = "move one of them away"
            raise PeftfxError(f"an earlier export is at {old}, and something else in its place", str(target), hint)
    _remove(old)
    _remove(area / _NEW)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory, ignore_errors=True)
