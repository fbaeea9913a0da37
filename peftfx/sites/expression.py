"""Expressions: the language of targets, read into functions from a site to the parts of it that are picked.

    expression := term ('|' term)*        union
    term       := factor ('&' factor)*    intersection
    factor     := '~' factor | '(' expression ')' | atom
    atom       := a role or group of roles (`attention.query`, `mlp`) | `all-linear`
                | a module path or the end of one (`q_proj`, `layers.0.mlp.up_proj`) | /a regular expression/

A word that is a role is a role; write `/(.*\\.)?head/` for a module of that name. A fused site is the set of its parts,
so `attention.query` picks the query rows of a fused projection, and `~attention.query` its other rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from peftfx.errors import PeftfxError
from peftfx.sites.site import ROLES, Site, in_role

ALL_LINEAR = "all-linear"
Target = str | re.Pattern[str] | Sequence[str]
Units = frozenset[str]  #: the parts of a site that are picked: their roles, or "" for a site that has no parts
Picker = Callable[[Site], Units]

_TOKEN = re.compile(r"\s*(?:(?P<regex>/(?:[^/\\]|\\.)+/)|(?P<word>[\w.-]+)|(?P<sign>[|&~()]))")
_GROUPS = frozenset(role.partition(".")[0] for role in ROLES)


def units(site: Site) -> Units:
    """All that can be picked of a site."""
    return frozenset(part.role for part in site.parts) or frozenset({""})


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is this module path, or its end."""
    return path == name or path.endswith(f".{name}")


def all_linear(site: Site) -> Units:
    """As in PEFT: every linear layer and Conv1D but heads; no embedding, no convolution."""
    return units(site) if site.kind == "linear" and site.role != "head" else frozenset()


def parse(target: Target) -> Picker:
    """A target as a function from a site to the parts of it that are picked."""
    if isinstance(target, re.Pattern):
        return lambda site: units(site) if target.fullmatch(site.path) else frozenset()
    if isinstance(target, str):
        return _Parser(target).parse()
    pickers = [parse(item) for item in target]
    return lambda site: frozenset().union(*(picker(site) for picker in pickers))


class _Parser:
    """A recursive-descent parser of one expression, into pickers."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def parse(self) -> Picker:
        picker = self._union()
        if self._peek():
            raise self._error("expected '|', '&' or the end")
        return picker

    def _union(self) -> Picker:
        picker = self._intersection()
        while self._take("|"):
            picker = _both(frozenset.union, picker, self._intersection())
        return picker

    def _intersection(self) -> Picker:
        picker = self._factor()
        while self._take("&"):
            picker = _both(frozenset.intersection, picker, self._factor())
        return picker

    def _factor(self) -> Picker:
        if self._take("~"):
            negated = self._factor()
            return lambda site: units(site) - negated(site)
        if self._take("("):
            inner = self._union()
            if not self._take(")"):
                raise self._error("expected ')'")
            return inner
        return self._atom()

    def _atom(self) -> Picker:
        found = _TOKEN.match(self.text, self.position)
        if not found or found["sign"]:
            raise self._error("expected a role, a module name, /a regular expression/, '~' or '('")
        start, self.position = self.position, found.end()
        if found["word"]:
            return _atom(found["word"])
        try:
            return parse(re.compile(found["regex"][1:-1]))
        except re.error as error:
            self.position = start
            raise self._error(f"bad regular expression: {error}") from error

    def _peek(self) -> str:
        return self.text[self.position :].lstrip()[:1]

    def _take(self, sign: str) -> bool:
        if self._peek() != sign:
            return False
        self.position = self.text.index(sign, self.position) + 1
        return True

    def _error(self, what: str) -> PeftfxError:
        rest = self.text[self.position :]
        column = self.position + len(rest) - len(rest.lstrip())
        hint = f"at column {column + 1}:\n    {self.text}\n    {' ' * column}^"
        return PeftfxError(f"cannot read the target: {what}", self.text, hint)


def _both(combine: Callable[[Units, Units], Units], left: Picker, right: Picker) -> Picker:
    return lambda site: combine(left(site), right(site))


def _atom(word: str) -> Picker:
    if word.lower() == ALL_LINEAR:
        return all_linear
    if word in ROLES or word in _GROUPS:
        return lambda site: _with_role(site, word)
    return lambda site: units(site) if ends_with(site.path, word) else frozenset()


def _with_role(site: Site, role: str) -> Units:
    if in_role(site.role, role):
        return units(site)
    return frozenset(part.role for part in site.parts if in_role(part.role, role))
