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
from collections.abc import Callable, Collection, Sequence

from peftfx.errors import PeftfxError, pointed, shown
from peftfx.sites.patterns import compiled
from peftfx.sites.site import ROLES, Site, in_role

ALL_LINEAR = "all-linear"
Target = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
Units = frozenset[str]  #: the parts of a site that are picked: their roles, or "" for a site that has no parts
Picker = Callable[[Site], Units]

_TOKEN = re.compile(r"\s*(?:(?P<regex>/(?:[^/\\]|\\.)+/)|(?P<word>[\w.-]+)|(?P<sign>[|&~()]))")
_SIGN = re.compile(r"\s*([|&~()]?)")
_DEEPEST = 100  #: parentheses inside one another
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
    if not isinstance(target, Collection) or not all(isinstance(item, str | re.Pattern) for item in target):
        raise PeftfxError(f"not a target: {shown(target)}", "target", "pass a text, as 'attention.query | mlp'")
    return _joined(frozenset.union, [parse(item) for item in target] or [lambda site: frozenset()])


class _Parser:
    """A recursive-descent parser of one expression, into pickers."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    def parse(self) -> Picker:
        picker = self._union()
        if self.text[self.position :].strip():
            raise self._error("expected '|', '&' or the end")
        return picker

    def _union(self) -> Picker:
        return self._joined("|", frozenset.union, self._intersection)

    def _intersection(self) -> Picker:
        return self._joined("&", frozenset.intersection, self._factor)

    def _joined(self, sign: str, combine: Callable[..., Units], read: Callable[[], Picker]) -> Picker:
        pickers = [read()]
        while self._take(sign):
            pickers.append(read())
        return _joined(combine, pickers)

    def _factor(self) -> Picker:
        negated = False
        while self._take("~"):
            negated = not negated
        picker = self._inner() if self._take("(") else self._atom()
        return (lambda site: units(site) - picker(site)) if negated else picker

    def _inner(self) -> Picker:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._error(f"more than {_DEEPEST} parentheses inside one another")
        picker = self._union()
        if not self._take(")"):
            raise self._error("expected ')'")
        self.depth -= 1
        return picker

    def _atom(self) -> Picker:
        found = _TOKEN.match(self.text, self.position)
        if not found or found["sign"]:
            raise self._error("expected a role, a module name, /a regular expression/, '~' or '('")
        if found["word"]:
            self.position = found.end()
            return _atom(found["word"])
        try:
            pattern = compiled(found["regex"][1:-1], "target")
        except PeftfxError as error:
            raise self._error(error.what) from error
        self.position = found.end()
        return lambda site: units(site) if pattern.fullmatch(site.path) else frozenset()

    def _take(self, sign: str) -> bool:
        found = _SIGN.match(self.text, self.position)
        if not found or found[1] != sign:
            return False
        self.position = found.end()
        return True

    def _error(self, what: str) -> PeftfxError:
        return PeftfxError(f"cannot read the target: {what}", self.text, pointed(self.text, self.position))


def _joined(combine: Callable[..., Units], pickers: Sequence[Picker]) -> Picker:
    return pickers[0] if len(pickers) == 1 else lambda site: combine(*(picker(site) for picker in pickers))


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
