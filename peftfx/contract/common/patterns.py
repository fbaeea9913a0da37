"""HF PEFT's patterns: options that are others for module paths that match a key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from peftfx.contract.method import Method
from peftfx.sites.patterns import compiled

N = TypeVar("N", int, float)


def by_path(patterns: Mapping[str, float], option: str, path: str, default: float) -> float:
    """HF PEFT's lookup: the first key that the path ends with, a regular expression."""
    found = (v for key, v in patterns.items() if compiled(key, option, r"^(.*\.)?({})$").fullmatch(path))
    return next(found, default)


def pattern_of(methods: Mapping[str, Method], name: str, default: N, *, escaped: bool = True) -> dict[str, N]:
    """The pattern that gives each module path the value that its method has of an option, where that is another.

    Not `escaped`, keys are paths as they are: some methods of HF PEFT take no expression for a whole path.
    """
    own = {path: getattr(method, name) for path, method in methods.items()}
    return {re.escape(path) if escaped else path: value for path, value in own.items() if value != default}
