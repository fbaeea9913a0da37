"""Regular expressions that a user or a file gives."""

from __future__ import annotations

import re

from peftfx.errors import PeftfxError


def compiled(pattern: str, where: str, around: str = "{}") -> re.Pattern[str]:
    """A regular expression, ready to match.

    Args:
        pattern: as it was given.
        where: the option that it is of.
        around: what it is put into, in place of `{}`.

    Raises:
        PeftfxError: it cannot be read, or asks for more than Python's matcher can do.
    """
    try:
        return re.compile(around.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        what = f"bad regular expression: {str(error) or 'too deep'}"
        raise PeftfxError(what, f"{where}: {pattern}" if where else pattern, "a list of names needs none") from error
