"""HF PEFT's patterns: options that have other values for module paths that match a key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.sites.patterns import compiled

N = TypeVar("N", int, float)


def refuse_ranks(r: int, rank_pattern: Mapping[str, int], method: str) -> None:
    """Refuse a rank, or a rank of some modules, that is below 1."""
    refuse_small("the rank", "r", r, rank_pattern, f"{method}(r=8)", "rank_pattern")


def refuse_small(what: str, option: str, value: int, pattern: Mapping[str, int], hint: str, of_pattern: str) -> None:
    """Refuse a value of an option, or one of its pattern, that is below 1.

    Args:
        what: the option, as a message names it.
        option, value: its name and its value.
        pattern: its values for the module paths that match a key.
        hint: what is said to do about `value`.
        of_pattern: the name of the option that holds `pattern`.
    """
    if value < 1:
        raise PeftfxError(f"{what} must be 1 or more, not {value}", option, hint)
    for key, own in pattern.items():
        if own < 1:
            hint = "to leave modules out, name them in exclude_modules"
            raise PeftfxError(f"{what} must be 1 or more, not {own}", f"{of_pattern}, {key}", hint)


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


def pattern_of(methods: Mapping[str, Method], name: str, default: N, *, loose: bool = False) -> dict[str, N]:
    """Return a pattern from each module path to its method's value of an option, where that is not `default`.

    Args:
        methods: the method of each module path.
        name: the option.
        default: its value elsewhere.
        loose: whether the keys are read as `by_loose_path` reads them.
    """
    return path_pattern({path: getattr(method, name) for path, method in methods.items()}, default, loose=loose)


def path_pattern(values: Mapping[str, N], default: N, *, loose: bool = False) -> dict[str, N]:
    """Return a pattern that gives each module path its own value, and no other path that one.

    A key also matches each longer path that ends with it. Where one of `values` has such a path, the key is written so
    that it matches its own path alone. Files sort keys, so the order of keys cannot decide.
    """
    ends = {path[at + 1 :] for path in values for at, letter in enumerate(path) if letter == "."}

    def key(path: str) -> str:
        if loose:  # no dot before the key, and an alternative that nothing matches
            return rf"(?!)|{re.escape(path)}" if path in ends else path
        return f"^{re.escape(path)}" if path in ends else re.escape(path)

    return {key(path): value for path, value in values.items() if value != default}
