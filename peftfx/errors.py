"""The one error a user of peftfx can cause, and the one warning: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import reprlib
import sys
import warnings
from collections.abc import Iterable
from typing import ClassVar


class PeftfxError(Exception):
    """Bad input: a path, a file, a key, a shape, a target or an option that peftfx cannot work with.

    The message fits on one screen, whatever it quotes; the attributes have all of it.

    Args:
        what: what is wrong, in one sentence.
        where: the module path, checkpoint key or file it is about; empty when there is no one place.
        hint: what to do, with the nearest valid name where one exists.
    """

    exit_code: ClassVar[int] = 2
    """What a command ends with that meets this error."""

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        place = f" [{_cut(where, 2, 300)}]" if where else ""
        advice = f"\n  hint: {_cut(hint, 6, 600)}" if hint else ""
        super().__init__(f"{_cut(what, 16, 1300)}{place}{advice}")


class PeftfxWarning(UserWarning):
    """What a user has to know and decide on; the command line shows it too."""


def _cut(text: str, lines: int, characters: int) -> str:
    """A text of at most so many lines and characters, and how much more there was."""
    rows = text.split("\n")
    kept = "\n".join(rows[:lines])
    if len(kept) > characters:
        return f"{kept[:characters]} ... ({len(text) - characters:,} more characters)"
    return kept + (f"\n  ... ({len(rows) - lines} more lines)" if len(rows) > lines else "")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """A value that a user gave, as Python writes it; the middle of what is long, and what lies deep, is left out."""
    return _SHORT.repr(value)


def pointed(text: str, position: int, around: int = 60) -> str:
    """Where something is wrong in a text that was typed: the line with a mark below it, or what is around the mark."""
    rest = text[position : position + around]
    column = position + len(rest) - len(rest.lstrip())
    start = max(0, column - around) if len(text) > 2 * around else 0
    part = text[start : start + 2 * around].replace("\n", " ")
    return f"at column {column + 1}:\n    {part}\n    {' ' * (column - start)}^"


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """`did you mean 'a', 'b'?` for the valid names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f"did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def warn(text: str) -> None:
    """Warn the user, at the line of theirs that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "peftfx":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, PeftfxWarning, stacklevel=level)
