"""The error for users' mistakes and the warning for users: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import reprlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import ClassVar


class PeftfxError(Exception):
    """An input that peftfx cannot work with: a path, a file, a key, a shape, a target or an option.

    The message fits on one screen, however long the quoted texts are; the attributes have the full texts.

    Args:
        what: what is wrong, in one sentence.
        where: the module path, checkpoint key or file that the error is about; empty if there is no single place.
        hint: what to do, with the nearest valid name if there is one.

    Examples:
        >>> try:
        ...     peftfx.transform(model, peftfx.LoRA(target="atention.query"))
        ... except peftfx.PeftfxError as error:
        ...     print(error.what)
        the target matches no site
    """

    exit_code: ClassVar[int] = 2
    """The exit code of a command that ends with this error."""

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        place = f" [{_cut(where, 2, 300)}]" if where else ""
        advice = f"\n  hint: {_cut(hint, 6, 600)}" if hint else ""
        super().__init__(f"{_cut(what, 16, 1300)}{place}{advice}")


class CaptureError(PeftfxError):
    """The code of a model, or of a call of it, that torch.export cannot follow. The code itself may run and train."""


class PeftfxWarning(UserWarning):
    """A warning about something that a user should know or decide; the command line shows it too."""


def _cut(text: str, lines: int, characters: int) -> str:
    """Return a text cut to this many lines and characters, with a note of how much is left out."""
    rows = text.split("\n")
    kept = "\n".join(rows[:lines])
    if len(kept) > characters:
        return f"{kept[:characters]} ... ({len(text) - characters:,} more characters)"
    return kept + (f"\n  ... ({len(rows) - lines} more lines)" if len(rows) > lines else "")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """Return a user's value as Python writes it, without the middle of long values and without deeply nested ones."""
    return _SHORT.repr(value)


def pointed(text: str, position: int) -> str:
    """Return the place of a mistake in a typed text: the line, or the text around the mistake, with a mark below."""
    around = 60  #: characters on each side
    rest = text[position : position + around]
    column = position + len(rest) - len(rest.lstrip())
    start = max(0, column - around) if len(text) > 2 * around else 0
    part = text[start : start + 2 * around].replace("\n", " ")
    return f"at column {column + 1}:\n    {part}\n    {' ' * (column - start)}^"


_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "Failed to allocate memory",
)  #: torch's words, and ONNX Runtime's


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that no memory is left. Torch and ONNX Runtime do not raise a MemoryError for it."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def raise_if_memory_is_out(error: BaseException) -> None:
    """Raise an error again if no memory is left. Then the error says nothing about the model that was being tried."""
    if out_of_memory(error):
        raise error


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's class name if it has no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def listed(texts: Sequence[str], most: int = 6, between: str = ", ") -> str:
    """Return the first texts in a row, and how many more there are: `a, b and 4 more`."""
    if len(texts) <= most:
        return between.join(texts)
    return f"{between.join(texts[:most])}{between.strip(', ')} and {len(texts) - most} more"


def how_many(number: int, noun: str) -> str:
    """Return a number with its noun, which is in the plural unless the number is 1: `1 module`, `1,204 modules`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Return `did you mean 'a', 'b'?` for the valid `names` closest to `name`, or an empty string.

    A valid name of one or two letters that `name` begins with comes first: `r` for `rank`.
    """
    known = list(names)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    short = [valid for valid in known if len(valid) in (1, 2) and name.startswith(valid) and valid not in close]
    close = [*short[:1], *close][:count]
    return f"did you mean {', '.join(repr(c) for c in close)}?" if close else ""


#: Whose frames a warning passes over: this package's, and those that may be between them.
_BETWEEN = frozenset({"peftfx", "torch", "functools", "contextlib"})


def warn(text: str) -> None:
    """Warn the user; the warning points to the line of the user's code that called this package, or torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, PeftfxWarning, stacklevel=level)
