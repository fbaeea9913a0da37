"""What a command wrote at its output before, which `--force` replaces, and what somebody has added since."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from peftfx.errors import PeftfxError, listed
from peftfx.files import already_there, is_file, read_json, writing
from peftfx.formats import REPORT

#: Returns the files that a command wrote into a directory, as paths in it; None if it did not make the directory.
FilesOf = Callable[[Path], Collection[str] | None]

FILES = "files"  #: the field in a JSON file of an output that lists the output's files
_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  #: what file managers leave in folders
_SHOWN = 3


def files_in(directory: Path) -> list[str]:
    """Return all files below a directory, as paths in it, without those of file managers. A link is a file."""
    found = (
        (Path(place) / name).relative_to(directory).as_posix()
        for place, folders, names in os.walk(directory)
        for name in (*names, *(folder for folder in folders if (Path(place) / folder).is_symlink()))
        if name not in _OF_SYSTEMS
    )
    return sorted(found)


def listed_in(directory: Path, record: str) -> Collection[str]:
    """Return the files of an output by the list in its JSON file `record`. Without such a list, only that is known."""
    with suppress(PeftfxError):
        listed = read_json(directory / record).get(FILES)
        if isinstance(listed, list):
            return [str(name) for name in listed]
    return [record]


def of_export(directory: Path) -> Collection[str] | None:
    """Return the files that an export or a merge wrote into a directory; None if it has no report."""
    return listed_in(directory, REPORT) if (directory / REPORT).is_file() else None


def of_folders(folders: Iterable[Path]) -> list[str]:
    """Return the files of folders that are side by side, as paths beside them: what exports list, and all of others."""
    return [f"{folder.name}/{name}" for folder in folders for name in of_export(folder) or files_in(folder)]


def refuse_standing(target: Path, force: bool, made: FilesOf) -> None:
    """Refuse an output that stands already, unless it may be replaced.

    Raises:
        PeftfxError: no such command made what is there; or somebody has added files since; or `force` is not set.
    """
    if not os.path.lexists(target):
        return
    written = made(target) if target.is_dir() else None
    if written is None and not (target.is_dir() and is_empty(target)):
        hint = "delete it yourself, or choose another output"
        raise PeftfxError("what is there is not an earlier output, so it is not replaced", str(target), hint)
    if added := sorted({*files_in(target)} - {*(written or ())}):
        what = f"files were added to the earlier output, and would be lost: {listed(added, _SHOWN)}"
        raise PeftfxError(what, str(target), "move them to another place, or choose another output")
    if not force:
        raise already_there(target)


def refuse_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, holds one, or is a file that stands in one.

    Raises:
        PeftfxError: it would replace what is read.
    """
    target = output.resolve()
    for place in (given.resolve() for given in inputs):
        if target == place or target in place.parents or (is_file(target) and place in target.parents):
            raise PeftfxError("the output would replace an input", str(output), "choose another output")


def is_empty(directory: Path) -> bool:
    """Return whether there is nothing in a directory. One that may not be read is a PeftfxError."""
    with writing(directory):
        return not any(directory.iterdir())
