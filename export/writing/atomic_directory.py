"""publish: a directory is written beside its target and moved into place when it is whole."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from peftfx.errors import PeftfxError
from peftfx.export.writing.file_lock import locked
from peftfx.files import already_there, writing
from peftfx.formats import REPORT

Mark = Callable[[Path], bool]
_NEW, _OLD = "new", "old"
_RESERVE = 4 << 20  #: bytes of address space that are kept back for the clean-up


def is_export(directory: Path) -> bool:
    """Whether an export made this directory: its report is in it."""
    return (directory / REPORT).is_file()


@contextlib.contextmanager
def publish(directory: str | Path, force: bool = False, made: Mark = is_export) -> Iterator[Path]:
    """Yield a temporary directory beside `directory`; on success it becomes `directory`, on any exception it goes away.

    Until then `.NAME.peftfx` is beside it, and is locked: of two that write to one place the second is refused. What a
    killed run left there is removed, or put back where the kill came between the two moves.

    Args:
        directory: where to.
        force: replace what is there, after success only.
        made: whether a directory is one that may be replaced; an empty one always may.

    Raises:
        PeftfxError: as of `check_output`; another is writing there; the disk refuses (no space, no permission, ...).
    """
    target = _safe(directory)
    area = target.with_name(f".{target.name}.peftfx")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(area, target):
            _recover(area, target, made)
            _refuse_standing(target, force, made)
            reserve = mmap.mmap(-1, _RESERVE)  # its own pages: what python frees is not always given back
            try:
                (area / _NEW).mkdir()
                yield area / _NEW
                _refuse_standing(target, force, made)  # minutes have passed
                _move(area, target)
                _remove(area / _OLD)
            finally:
                reserve.close()  # where memory has ended, listing a directory needs some
                _recover(area, target, made)


def check_output(directory: str | Path, force: bool, made: Mark = is_export) -> Path:
    """Where an output directory will be, its parents' links followed.

    Raises:
        PeftfxError: it is there, and `force` is not set or nothing of ours made it; or it is a link; or it is, or
            holds, the working directory or the user's home.
    """
    target = _safe(directory)
    _refuse_standing(target, force, made)
    return target


def _safe(directory: str | Path) -> Path:
    with writing(Path(directory)):
        target = _resolved(Path(directory))
    for place, what in _homes():
        if any(_same(target, above) for above in (place, *place.parents)):
            is_it = "is" if _same(target, place) else "holds"
            hint = "name a directory to make, as in --output out"
            raise PeftfxError(f"the output {is_it} {what}", str(target), hint)
    if os.path.islink(target):
        raise PeftfxError("the output is a link", str(target), "pass the directory that it leads to, or remove it")
    return target


def _refuse_standing(target: Path, force: bool, made: Mark) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise already_there(target)
    if not target.is_dir() or not (made(target) or _is_empty(target)):
        hint = "delete it yourself, or choose another output"
        raise PeftfxError("the directory there is not an export, so it is not replaced", str(target), hint)


def _resolved(directory: Path) -> Path:
    """An absolute path whose last part may be a link, but no other."""
    if directory.name in ("", ".."):
        return Path(os.path.realpath(directory))
    return Path(os.path.realpath(directory.parent)) / directory.name


def _homes() -> Iterator[tuple[Path, str]]:
    yield Path.cwd(), "the working directory"
    with contextlib.suppress(RuntimeError):  # a user without one
        yield Path(os.path.realpath(Path.home())), "your home directory"


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one directory, however they are written."""
    try:
        return one == other or (not os.path.islink(one) and os.path.samefile(one, other))
    except (OSError, ValueError):  # a ValueError: no file system takes the path
        return False


def _is_empty(directory: Path) -> bool:
    with writing(directory):
        return not any(directory.iterdir())


def _move(area: Path, target: Path) -> None:
    """Move what is new to the target. A directory cannot replace one that has files, so the old one steps aside."""
    if os.path.lexists(target):
        os.rename(target, area / _OLD)
    try:
        os.rename(area / _NEW, target)
    except OSError as error:
        if os.path.lexists(target):  # since the last look
            raise already_there(target) from error
        raise


def _recover(area: Path, target: Path, made: Mark) -> None:
    """Put back what stepped aside if nothing took its place, and remove what is left."""
    old = area / _OLD
    if old.exists():
        if not os.path.lexists(target):
            os.rename(old, target)
        elif not made(target):
            hint = "move one of them away"
            raise PeftfxError(f"an earlier export is at {old}, and something else in its place", str(target), hint)
    _remove(old)
    _remove(area / _NEW)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory, ignore_errors=True)
