"""The one error a user of peftfx can cause: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftfxError(Exception):
    """Bad input: a path, a file, a key, a shape, a target or an option that peftfx cannot work with.

    Args:
        what: what is wrong, in one sentence.
        where: the module path, checkpoint key or file it is about; empty when there is no one place.
        hint: what to do, with the nearest valid name where one exists.
    """

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        place = f" [{where}]" if where else ""
        super().__init__(f"{what}{place}" + (f"\n  hint: {hint}" if hint else ""))


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """`did you mean 'a', 'b'?` for the valid names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f"did you mean {', '.join(repr(c) for c in close)}?" if close else ""
