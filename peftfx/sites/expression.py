"""Expressions: the language of targets, compiled to functions that say which parts of a site are picked.

    expression := term ('|' term)*        union
    term       := factor ('&' factor)*    intersection
    factor     := '~' factor | '(' expression ')' | relation | atom
    relation   := 'upstream' '(' expression ')' | 'downstream' '(' expression ')'
                | 'between' '(' expression ',' expression ')'
    atom       := a role or group of roles (`attention.query`, `mlp`) | `all-linear`
                | a module path or the end of one (`q_proj`, `layers.0.mlp.up_proj`) | /a regular expression/

A word that is a role always means the role; for a module named `head`, write `/(.*\\.)?head/`. A fused site is the set
of its parts, so `attention.query` picks the query rows of a fused projection, and `~attention.query` its other rows.

`upstream(T)` are the sites whose values reach a site that T picks, `downstream(T)` the sites that values of T's sites
reach, and `between(A, B)` is `downstream(A) & upstream(B)`; see `peftfx.sites.network`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from peftfx.errors import PeftfxError, pointed, shown
from peftfx.sites.patterns import compiled
from peftfx.sites.site import PATTERN, ROLES, Site, in_role

ALL_LINEAR = "all-linear"
Target = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
Units = frozenset[str]  #: the parts of a site that are picked: their roles, or "" for a site that has no parts
Picker = Callable[[Site], Units]
Reading = Callable[[Iterable[Site]], Picker]  #: a compiled target, to be applied to a model's sites
RELATIONS = {
    "upstream": 1,
    "downstream": 1,
    "between": 2,
}  #: the words for sites around other sites, with the number of targets that each takes

_TOKEN = re.compile(r"\s*(?:(?P<regex>/(?:[^/\\]|\\.)+/)|(?P<word>[\w.-]+)|(?P<sign>[|&~(),]))")
_SIGN = re.compile(r"\s*([|&~(),]?)")
_DEEPEST = 100  #: the deepest nesting of parentheses
_GROUPS = frozenset(role.partition(".")[0] for role in ROLES)


def units(site: Site) -> Units:
    """Return all units of a site that a target can pick."""
    return frozenset(part.role for part in site.parts) or frozenset({""})


def ends_with(path: str, name: str) -> bool:
    """Return whether the module path `path` is `name`, or ends with `name` after a dot."""
    return path == name or path.endswith(f".{name}")


def ends_with_any(path: str, names: Iterable[str]) -> bool:
    """Return whether a path ends with one of some names, as `ends_with` says."""
    return any(ends_with(path, name) for name in names)


def ends_of(path: str) -> list[str]:
    """Return the names that a module path ends with, as `ends_with` says: the path itself first."""
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names))]


def is_role(word: str) -> bool:
    """Return whether a word of a target is a role, a group of roles, or `all-linear`."""
    return word in ROLES or word in _GROUPS or word.lower() == ALL_LINEAR


def words_of(text: str) -> list[str]:
    """Return the words of an expression that name roles or modules."""
    found, position = list[str](), 0
    while token := _TOKEN.match(text, position):
        position = token.end()
        if (word := token["word"]) and not (word in RELATIONS and text[position:].lstrip().startswith("(")):
            found.append(word)
    return found


def all_linear(site: Site) -> Units:
    """Pick every linear layer and Conv1D but heads, and no embedding or convolution, as HF PEFT does."""
    return units(site) if site.kind == "linear" and site.role != "head" else frozenset()


def parse(target: Target) -> Reading:
    """Compile a target to a function from a model's sites to a picker, which gives the picked parts of a site."""
    if isinstance(target, re.Pattern):
        return _alone(lambda site: units(site) if target.fullmatch(site.path) else frozenset())
    if isinstance(target, str):
        return _Parser(target).parse()
    if not isinstance(target, Collection) or not all(isinstance(item, str | re.Pattern) for item in target):
        raise PeftfxError(f"not a target: {shown(target)}", "target", "pass a text, as 'attention.query | mlp'")
    return _joined(frozenset.union, [parse(item) for item in target] or [_alone(lambda site: frozenset())])


class _Parser:
    """A recursive-descent parser that compiles one expression."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    def parse(self) -> Reading:
        reading = self._union()
        if self.text[self.position :].strip():
            raise self._error("expected '|', '&' or the end; a regular expression stands between slashes: /.../")
        return reading

    def _union(self) -> Reading:
        return self._joined("|", frozenset.union, self._intersection)

    def _intersection(self) -> Reading:
        return self._joined("&", frozenset.intersection, self._factor)

    def _joined(self, sign: str, combine: Callable[..., Units], read: Callable[[], Reading]) -> Reading:
        readings = [read()]
        while self._take(sign):
            readings.append(read())
        return _joined(combine, readings)

    def _factor(self) -> Reading:
        negated = False
        while self._take("~"):
            negated = not negated
        reading = self._inner(1)[0] if self._take("(") else self._atom()
        return _without(reading) if negated else reading

    def _inner(self, count: int) -> list[Reading]:
        """Parse `count` expressions with commas between them, and the closing parenthesis."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._error(f"more than {_DEEPEST} parentheses inside one another")
        readings = [self._union()]
        while len(readings) < count:
            if not self._take(","):
                raise self._error("expected ',' and another target")
            readings.append(self._union())
        if not self._take(")"):
            raise self._error("expected ')'")
        self.depth -= 1
        return readings

    def _atom(self) -> Reading:
        found = _TOKEN.match(self.text, self.position)
        if not found or found["sign"]:
            raise self._error("expected a role, a module name, /a regular expression/, '~' or '('")
        if found["word"]:
            self.position = found.end()
            if found["word"] in RELATIONS and self._take("("):
                return _relation(found["word"], self._inner(RELATIONS[found["word"]]))
            return _alone(_atom(found["word"]))
        try:
            pattern = compiled(found["regex"][1:-1], "target")
        except PeftfxError as error:
            raise self._error(error.what) from error
        self.position = found.end()
        return _alone(lambda site: units(site) if pattern.fullmatch(site.path) else frozenset())

    def _take(self, sign: str) -> bool:
        found = _SIGN.match(self.text, self.position)
        if not found or found[1] != sign:
            return False
        self.position = found.end()
        return True

    def _error(self, what: str) -> PeftfxError:
        return PeftfxError(f"cannot read the target: {what}", self.text, pointed(self.text, self.position))


def _alone(picker: Picker) -> Reading:
    """Return a reading whose picker looks at one site at a time, without the other sites."""
    return lambda sites: picker


def _without(reading: Reading) -> Reading:
    def read(sites: Iterable[Site]) -> Picker:
        picker = reading(sites)
        return lambda site: units(site) - picker(site)

    return read


def _joined(combine: Callable[..., Units], readings: Sequence[Reading]) -> Reading:
    def read(sites: Iterable[Site]) -> Picker:
        pickers = [reading(sites) for reading in readings]
        return lambda site: combine(*(picker(site) for picker in pickers))

    return readings[0] if len(readings) == 1 else read


def _relation(name: str, readings: Sequence[Reading]) -> Reading:
    def read(sites: Iterable[Site]) -> Picker:
        from peftfx.sites.dataflow import keys_of
        from peftfx.sites.network import picked_by

        network = getattr(sites, "network", None)
        if network is None:
            hint = "ask the sites of the whole base, as peftfx.inspect(model) gives them"
            raise PeftfxError(f"{name}(...) needs the model, and these are only its sites", "target", hint)
        listed = list(sites)
        keys = {(site.path, site.kind): key for site, key in zip(listed, keys_of(listed), strict=True)}
        pickers = [reading(sites) for reading in readings]
        made = network()
        around = [[keys[site.path, site.kind] for site in listed if picker(site)] for picker in pickers]
        found = picked_by(name, made, *([key for key in own if key in made] for own in around))
        return lambda site: units(site) if keys.get((site.path, site.kind)) in found else frozenset()

    return read


def _atom(word: str) -> Picker:
    if word.lower() == ALL_LINEAR:
        return all_linear
    if word in ROLES or word in _GROUPS:
        return lambda site: _with_role(site, word)
    return lambda site: units(site) if ends_with(site.path, word) or _is_own_role(site, word) else frozenset()


def _is_own_role(site: Site, word: str) -> bool:
    """Return whether `word` is the role that a user gave a pattern, or a group of such roles."""
    return site.kind == PATTERN and in_role(site.role, word)


def _with_role(site: Site, role: str) -> Units:
    if in_role(site.role, role):
        return units(site)
    return frozenset(part.role for part in site.parts if in_role(part.role, role))
