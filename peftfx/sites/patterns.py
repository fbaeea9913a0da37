"""Regular expressions from users and files, matched in bounded time.

Python's `re` tries the ways through an expression one after another, and `(a+)+b` has 2^n ways. Where there may be too
many ways, the matcher of this module follows all at once: it carries a set of positions through the expression, as the
bits of a number.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any, Protocol

from peftfx.errors import PeftfxError

try:
    from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
except ImportError:  # a Python that has these modules elsewhere: then expressions that are not plain are refused
    _parser = None

_LENGTH = 64  #: the length of a long module path
_WAYS = 50_000  #: ways through an expression, at a path of that length, that Python tries in some milliseconds
_STEPS, _MORE = 1_000_000, 2_000  #: steps of this matcher for one expression, and for each match: about a second
_NO_CODE = "write it without nested repetitions, or as a list of names"


class _Matcher(Protocol):
    """An expression that can match whole paths."""

    def fullmatch(self, string: str, /) -> object:
        """Return a true value if the expression matches all of a path."""


def compiled(pattern: str, where: str, around: str = "{}") -> _Matcher:
    """Compile a regular expression that matches in bounded time.

    Args:
        pattern: the expression.
        where: the option that the expression belongs to, for messages.
        around: a larger expression, in which the pattern replaces `{}`.

    Raises:
        PeftfxError: the expression cannot be read, is too large for Python's matcher, or may take too long.
    """
    return _compiled(pattern, where, around)


def quick(pattern: str, where: str, around: str = "{}") -> re.Pattern[str]:
    """Compile a regular expression whose groups are needed. An expression that could take long is refused."""
    found = _compiled(pattern, where, around)
    if isinstance(found, re.Pattern):
        return found
    raise _refused(pattern, where)


@lru_cache(4096)
def _compiled(pattern: str, where: str, around: str) -> re.Pattern[str] | _AllWays:
    text = around.replace("{}", pattern)
    try:
        with warnings.catch_warnings():  # about other versions of Python, where a user can change nothing
            warnings.simplefilter("ignore", FutureWarning)
            found = re.compile(text)
            tree = None if _parser is None else _parser.parse(text)
        if tree is None:
            raise _refused(pattern, where)
        if _ways(tree) <= _WAYS:
            return found
        return _AllWays(tree, found.flags, (pattern, where))
    except (re.error, OverflowError, RecursionError) as error:
        what = f"bad regular expression: {str(error) or 'too deep'}"
        raise PeftfxError(what, f"{where}: {pattern}" if where else pattern, "a list of names needs none") from error


def _refused(pattern: str, where: str) -> PeftfxError:
    shown = pattern if len(pattern) < 200 else f"{pattern[:200]}..."
    what = "this regular expression may take too long"
    return PeftfxError(what, f"{where}: {shown}" if where else shown, _NO_CODE)


def _ways(tree: Any) -> int:
    """Return an upper bound of the number of ways through an expression. Above `_WAYS` it is only a large number."""
    total = 1
    for kind, given in tree:
        total *= _ways_of(str(kind), given)
        if total > _WAYS:
            return total
    return total


def _ways_of(kind: str, given: Any) -> int:
    if kind == "BRANCH":
        return sum(map(_ways, given[1]))
    if kind == "SUBPATTERN":
        return _ways(given[3])
    if kind == "ATOMIC_GROUP":
        return _ways(given)
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _ways(given[1])
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(part) for part in given[1:] if part is not None)
    if not kind.endswith("REPEAT"):
        return 1
    least, most, body = (min(int(given[0]), _LENGTH), min(int(given[1]), _LENGTH), _ways(given[2]))
    if body == 1:
        return most - least + 1
    return body**most * (2 if most > least else 1) if body <= _WAYS else body


class _AllWays:
    """An expression whose ways are all followed at once."""

    def __init__(self, tree: Any, flags: int, named: tuple[str, str]) -> None:
        self._tree, self._flags, self._named = tree, flags & ~re.DEBUG, named
        self._left = _STEPS
        self._known: dict[str, bool] = {}

    def fullmatch(self, string: str, /) -> bool:
        """Return whether the expression matches all of a text.

        Raises:
            PeftfxError: the match takes too long, or the expression has a part that cannot be followed in all ways,
                such as a reference to a group.
        """
        if string not in self._known:
            end = 1 << len(string)
            self._left += _MORE
            self._known[string] = bool(self._run(self._tree, 1, _Text(string), self._flags) & end)
        return self._known[string]

    def _run(self, tree: Any, at: int, text: _Text, flags: int) -> int:
        """Return the positions after an expression that starts at one of the positions `at`; a position is a bit."""
        for kind, given in tree:
            if not at:
                return 0
            at = self._step(str(kind), given, at, text, flags)
        return at

    def _step(self, kind: str, given: Any, at: int, text: _Text, flags: int) -> int:
        self._left -= 1
        if self._left < 0:
            raise _refused(*self._named)
        if kind == "BRANCH":
            found = 0
            for branch in given[1]:
                found |= self._run(branch, at, text, flags)
            return found
        if kind == "SUBPATTERN":
            return self._run(given[3], at, text, (flags | given[1]) & ~given[2])
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = given
            return self._repeat(least, most, body, at, text, flags)
        if kind in ("ASSERT", "ASSERT_NOT"):
            way, body = given
            return self._look(kind, way, body, at, text, flags)
        if kind == "AT":
            return text.zero_width(given, flags) & at
        if kind in _ONE_CHARACTER:
            return (text.one(kind, given, flags) & at) << 1
        raise _refused(*self._named)

    def _repeat(self, least: int, most: int, body: Any, at: int, text: _Text, flags: int) -> int:
        for _ in range(least):
            before, at = at, self._run(body, at, text, flags)
            if at in (0, before):
                break
        seen = new = at
        for _ in range(most - least):
            new = self._run(body, new, text, flags) & ~seen
            if not new:
                break
            seen |= new
        return seen

    def _look(self, kind: str, way: int, body: Any, at: int, text: _Text, flags: int) -> int:
        """Return the positions where a lookahead or lookbehind holds."""
        back = body.getwidth()[0] if way < 0 else 0
        found = 0
        for position in (i for i in range(len(text.string) + 1) if at >> i & 1):
            start = position - back
            ends = self._run(body, 1 << start, text, flags) if start >= 0 else 0
            there = bool(ends >> position & 1 if way < 0 else ends)
            found |= (there == (kind == "ASSERT")) << position
        return found


_ONE_CHARACTER = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


class _Text:
    """A text, and the positions where single characters and anchors match, as bits."""

    def __init__(self, string: str) -> None:
        self.string = string
        self._masks: dict[object, int] = {}

    def one(self, kind: str, given: Any, flags: int) -> int:
        """Return the positions of the characters that a part of an expression matches."""
        key = (kind, str(given), flags)
        if key not in self._masks:
            part = _part(kind, given, flags)
            self._masks[key] = sum(1 << i for i, c in enumerate(self.string) if part.match(c))
        return self._masks[key]

    def zero_width(self, given: Any, flags: int) -> int:
        """Return the positions at which an anchor matches."""
        key = ("AT", str(given), flags)
        if key not in self._masks:
            part = _part("AT", given, flags)
            self._masks[key] = sum(1 << i for i in range(len(self.string) + 1) if part.match(self.string, i))
        return self._masks[key]


def _part(kind: str, given: Any, flags: int) -> re.Pattern[str]:
    """Return a regular expression of one part of a parsed expression."""
    state = _parser.State()
    state.flags = flags
    made: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [(getattr(_constants, kind), given)]), flags)
    return made
