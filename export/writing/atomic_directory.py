"""publish: a directory is written beside its target and moved into place when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from peftfx.errors import PeftfxError
from peftfx.files import writing

_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def publish(directory: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `directory`; on success it becomes `directory`, on any exception it goes away.

    With `force` an existing target is replaced, after success only. What a killed run left beside the target is
    removed, or put back where the kill came between the two moves.

    Raises:
        PeftfxError: the target exists and `force` is not set, or the disk refuses (no space, no permission, ...).
    """
    target = Path(os.path.abspath(directory))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        if target.exists() and not force:
            raise PeftfxError("the output exists already", str(target), "pass --force (force=True) to replace it")
        temporary = _beside(target, _NEW)
        temporary.mkdir()
    try:
        with writing(target):
            yield temporary
            _replace(temporary, target)
    finally:
        _remove(temporary)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}")


def _replace(temporary: Path, target: Path) -> None:
    """Move `temporary` to `target`. A directory cannot replace one that has files, so the old one steps aside first."""
    if not target.exists():
        os.replace(temporary, target)
        return
    aside = _beside(target, _OLD)
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(aside, target)
        raise
    _remove(aside)


def _sweep(target: Path) -> None:
    """Clean up after runs that were killed: their process is gone, their directories are still here."""
    for leftover in sorted(target.parent.glob(f".{_escape(target.name)}.*-*.*")):
        stamp, kind = leftover.name.removeprefix(f".{target.name}.").rsplit(".", 1)
        process = stamp.partition("-")[0]
        if kind not in (_NEW, _OLD) or not process.isdigit() or _alive(int(process)):
            continue
        if kind == _OLD and not target.exists():
            os.replace(leftover, target)
        else:
            _remove(leftover)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
