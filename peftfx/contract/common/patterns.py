"""HF PEFT's patterns: options that have other values for module paths that match a key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from peftfx.contract.method import Method
from peftfx.sites.patterns import compiled

N = TypeVar("N", int, float)


def by_path(patterns: Mapping[str, float], option: str, path: str, default: float) -> float:
    """Return the value of the first key, a regular expression, that matches the end of `path`, or else `default`."""
    found = (v for key, v in patterns.items() if compiled(key, option, r"^(.*\.)?({})$").fullmatch(path))
    return next(found, default)


def by_loose_path(patterns: Mapping[str, float], option: str, path: str, default: float) -> float:
    """Return the value for `path` as the methods of HF PEFT that read a key otherwise find it.

    The first key counts for which `.*\\.KEY$` matches the path's start; a `|` in the key parts that whole expression.
    Otherwise a key counts that is the path, letter by letter.
    """
    found = (key for key in patterns if compiled(key, option, r"(?:.*\.{}$)[\s\S]*").fullmatch(path))
    return patterns.get(next(found, path), default)


def pattern_of(methods: Mapping[str, Method], name: str, default: N, *, escaped: bool = True) -> dict[str, N]:
    """Return a pattern from each module path to its method's value of an option, where that is not `default`.

    Keys are escaped for a regular expression. If not `escaped`, they are plain paths: some methods of HF PEFT do not
    read a whole path as an expression.
    """
    own = {path: getattr(method, name) for path, method in methods.items()}
    return {re.escape(path) if escaped else path: value for path, value in own.items() if value != default}
