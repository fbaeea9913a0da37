"""A layer's own number, which tells whether the layer's code computes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import cache_utils

#: The names of attributes that hold it.
NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "idx"})


class Number(int):
    """A layer's own number, which records whether the layer's code computes with it.

    Its use as an index into a list is not recorded, because the list's entry is part of the kind. Its use in a cache is
    not recorded either, because caches use it only as a place.
    """

    used = False

    def _see(self) -> None:
        if sys._getframe(2).f_code.co_filename != cache_utils.__file__:
            self.used = True


def _seen(name: str) -> Callable[..., object]:
    own = getattr(int, name)

    def method(self: Number, *args: object) -> object:
        self._see()
        return own(self, *args)

    return method


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rdivmod", "rpow", "neg", "pos", "abs", "invert"),
    *("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "float", "str", "format", "round"),
    *("int", "trunc", "ceil", "floor", "repr"),
):
    setattr(Number, f"__{_name}__", _seen(f"__{_name}__"))


ModulesOf = Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]
"""Gives the modules of a layer whose code a capture runs, by their paths within it, the layer itself first."""


@contextmanager
def numbered(layer: nn.Module, modules: ModulesOf) -> Iterator[list[Number]]:
    """Make each layer number in the layer's attributes a `Number` inside the context, and yield these numbers."""
    own_parts = [vars(module) for _, module in modules(layer)]
    found = [(own, k, v) for own in own_parts for k, v in own.items() if k in NUMBERS and type(v) is int]
    numbers = [Number(value) for _, _, value in found]
    for (own, name, _), number in zip(found, numbers, strict=True):
        own[name] = number
    try:
        yield numbers
    finally:
        for own, name, value in found:
            own[name] = value
