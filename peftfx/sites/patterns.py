"""Regular expressions that a user or a file gives: what could keep Python's matcher busy for years is matched here.

Python's `re` tries one way through an expression after another; `(a+)+b` has 2^n of them. Where there may be too many,
all ways are followed at once: a set of positions is carried through the expression, bit by bit of a number.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any, Protocol

from peftfx.errors import PeftfxError

try:
    from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
except ImportError:  # a Python that keeps them elsewhere: then what is not plain is refused
    _parser = None

_LENGTH = 64  #: of a module path, about
_WAYS = 50_000  #: through an expression, at a path of that length: Python tries them in some milliseconds
_STEPS, _MORE = 1_000_000, 2_000  #: of the matcher here, in all matches of one expression, and more for each: a second
_NO_CODE = "write it without nested repetitions, or as a list of names"


class _Matcher(Protocol):
    """What can be asked of an expression."""

    def fullmatch(self, string: str, /) -> object:
        """Whether it matches a whole path: something true."""


def compiled(pattern: str, where: str, around: str = "{}") -> _Matcher:
    """A regular expression, ready to match in bounded time.

    Args:
        pattern: as it was given.
        where: the option that it is of.
        around: what it is put into, in place of `{}`.

    Raises:
        PeftfxError: it cannot be read, or asks for more than Python's matcher can do, or for too much time.
    """
    return _compiled(pattern, where, around)


def quick(pattern: str, where: str, around: str = "{}") -> re.Pattern[str]:
    """The same for an expression whose groups are needed; one that could take long is refused."""
    found = _compiled(pattern, where, around)
    if isinstance(found, re.Pattern):
        return found
    raise _refused(pattern, where)


@lru_cache(4096)
def _compiled(pattern: str, where: str, around: str) -> re.Pattern[str] | _AllWays:
    text = around.replace("{}", pattern)
    try:
        with warnings.catch_warnings():  # of what another Python may read in another way: nobody here can change that
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
    """How many ways there may be through an expression, at most; beyond `_WAYS` any number."""
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
    """An expression that is matched in all ways at once."""

    def __init__(self, tree: Any, flags: int, named: tuple[str, str]) -> None:
        self._tree, self._flags, self._named = tree, flags & ~re.DEBUG, named
        self._left = _STEPS
        self._known: dict[str, bool] = {}

    def fullmatch(self, string: str, /) -> bool:
        """Whether it matches all of a text.

        Raises:
            PeftfxError: it takes too long, or has what cannot be followed in all ways: a reference to a group.
        """
        if string not in self._known:
            end = 1 << len(string)
            self._left += _MORE
            self._known[string] = bool(self._run(self._tree, 1, _Text(string), self._flags) & end)
        return self._known[string]

    def _run(self, tree: Any, at: int, text: _Text, flags: int) -> int:
        """The positions behind an expression that begins at one of these; a position is a bit."""
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
        """The positions where what is ahead, or behind, is or is not so."""
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
    """A text, and where in it single characters and anchors match, as bits."""

    def __init__(self, string: str) -> None:
        self.string = string
        self._masks: dict[object, int] = {}

    def one(self, kind: str, given: Any, flags: int) -> int:
        """The positions of characters that a part of an expression matches."""
        key = (kind, str(given), flags)
        if key not in self._masks:
            part = _part(kind, given, flags)
            self._masks[key] = sum(1 << i for i, c in enumerate(self.string) if part.match(c))
        return self._masks[key]

    def zero_width(self, given: Any, flags: int) -> int:
        """The positions at which an anchor matches."""
        key = ("AT", str(given), flags)
        if key not in self._masks:
            part = _part("AT", given, flags)
            self._masks[key] = sum(1 << i for i in range(len(self.string) + 1) if part.match(self.string, i))
        return self._masks[key]


def _part(kind: str, given: Any, flags: int) -> re.Pattern[str]:
    """An expression of one part of a parsed one."""
    state = _parser.State()
    state.flags = flags
    made: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [(getattr(_constants, kind), given)]), flags)
    return made
