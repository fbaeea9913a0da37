"""A layer's own number: what the layer's code does with it, told from the place in the code that reads it.

Layers are copied as if they had no number. That is right where the number only picks what the description of a layer's
kind has: the entry of a described list, or the layer's place in a cache. Where the code reads the number tells:
`types[self.idx]` is such a use if `types` is a described list. Every other use counts as one that makes a difference.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import CodeType, FrameType
from typing import Protocol

from torch import nn
from transformers import Cache, EncoderDecoderCache, cache_utils

#: The names of attributes that hold it.
NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "idx"})
_NOTHING = object()

ModulesOf = Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]
"""Gives the modules of a layer whose code a capture runs, by their paths within it, the layer itself first."""


class Follows(Protocol):
    """Tells which uses of a layer's number its description has."""

    def has_entry(self, container: object) -> bool:
        """Return whether it has the entry at the layer's number of this list."""

    def has_place(self, owner: object, method: str) -> bool:
        """Return whether this method takes a number as a place in a cache that it has."""


def is_place(owner: object, method: str, caches: Iterable[Cache]) -> bool:
    """Return whether a method of one of the caches, or of two together, takes a layer's number as a place.

    The methods of transformers' own classes do; those of a class that is derived from them may do anything else.
    """
    if not isinstance(owner, Cache):
        return False
    parts: tuple[Cache, ...] = (owner,)
    if isinstance(owner, EncoderDecoderCache):
        parts = (owner.self_attention_cache, owner.cross_attention_cache)
    known = [id(cache) for cache in caches]
    code = getattr(inspect.getattr_static(owner, method, None), "__code__", None)
    return code is not None and code.co_filename == cache_utils.__file__ and all(id(part) in known for part in parts)


@contextmanager
def noting_uses(layer: nn.Module, modules: ModulesOf, follows: Follows) -> Iterator[list[str]]:
    """Yield a list that gets the place of each use of the layer's number that `follows` does not know."""
    parts = [module for _, module in modules(layer)]
    held = [(part, name) for part in parts for name in NUMBERS & vars(part).keys() if type(vars(part)[name]) is int]
    owners, uses = {id(vars(part)) for part in parts}, list[str]()
    with ExitStack() as stack:
        for kind, name in {(type(part), name): None for part, name in held}:
            if _is_computed(inspect.getattr_static(kind, name, None)):
                uses.append(f"{kind.__qualname__}.{name}")
            else:
                stack.enter_context(_watched(kind, name, _Watch(name, owners, follows, uses)))
        yield uses


@contextmanager
def _watched(kind: type[nn.Module], name: str, watch: _Watch) -> Iterator[None]:
    watch.before = vars(kind).get(name, _NOTHING)
    setattr(kind, name, watch)
    try:
        yield
    finally:
        if watch.before is _NOTHING:
            delattr(kind, name)
        else:
            setattr(kind, name, watch.before)


class _Watch:
    """An attribute of a class that gives what the instances hold under its name, and notes where their code reads it.

    Attributes:
        before: what the class itself held under this name.
    """

    before: object = _NOTHING

    def __init__(self, name: str, owners: set[int], follows: Follows, uses: list[str]) -> None:
        self.name, self.owners, self.follows, self.uses = name, owners, follows, uses

    def __get__(self, module: nn.Module | None, kind: type) -> object:
        own = {} if module is None else vars(module)
        if self.name not in own:
            return self._of_class(kind)
        frame = sys._getframe(1)
        if id(own) in self.owners and not _is_followed(frame, self.name, self.follows):
            self.uses.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return own[self.name]

    def __set__(self, module: nn.Module, value: object) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[self.name]

    def _of_class(self, kind: type) -> object:
        for held in (vars(k)[self.name] for k in kind.__mro__ if self.name in vars(k)):
            value = held.before if isinstance(held, _Watch) else held
            if value is not _NOTHING:
                return value
        raise AttributeError(self.name)


def _is_computed(value: object) -> bool:
    return hasattr(type(value), "__get__") and not isinstance(value, _Watch)


def _is_followed(frame: FrameType, name: str, follows: Follows) -> bool:
    """Return whether the instruction that `frame` runs reads the number for a use that is known."""
    read, use = _read(frame, name)
    match use:
        case ast.Compare(ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.Subscript(value=container) if use.slice is read:
            return follows.has_entry(_value(container, frame))
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if read is not use.func:
            return follows.has_place(_value(owner, frame), method)
    return False


def _read(frame: FrameType, name: str) -> tuple[ast.AST | None, ast.AST | None]:
    """Return the expression that reads the number, and the one that it is an operand of; None where it is not known."""
    positions = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    return _reads(frame.f_code).get((name, positions[1], positions[3]), (None, None))


_Reads = Mapping[tuple[str, int | None, int | None], tuple[ast.AST, ast.AST]]


@functools.lru_cache(maxsize=256)
def _reads(code: CodeType) -> _Reads:
    """Return the reads of numbers in a function, by name and by where they end."""
    lines = linecache.getlines(code.co_filename)
    first = code.co_firstlineno
    last = max((end or first for _, end, *_ in code.co_positions()), default=first)
    own = lines[first - 1 : last]
    if own and own[0][:1].isspace():  # a method: what stands before it keeps its columns
        own, first = ["if 1:\n", *own], first - 1
    with suppress(SyntaxError):
        return _reads_in(ast.parse("".join(own)), first - 1)
    with suppress(SyntaxError):  # a lambda within a statement
        return _reads_in(ast.parse("".join(lines)), 0)
    return {}


def _reads_in(tree: ast.AST, before: int) -> _Reads:
    found: dict[tuple[str, int | None, int | None], tuple[ast.AST, ast.AST]] = {}
    for node in (n for n in ast.walk(tree) if not isinstance(n, ast.keyword)):
        for child in ast.iter_child_nodes(node):
            inner = child.value if isinstance(child, ast.keyword) else child
            if isinstance(inner, ast.Attribute) and inner.attr in NUMBERS:
                found[inner.attr, (inner.end_lineno or 0) + before, inner.end_col_offset] = inner, node
    return found


def _value(expression: ast.expr, frame: FrameType) -> object:
    """Return the value of a name or of attributes that no code computes; `_NOTHING` for another expression."""
    if isinstance(expression, ast.Name):
        return frame.f_locals.get(expression.id, frame.f_globals.get(expression.id, _NOTHING))
    if isinstance(expression, ast.Attribute):
        held = inspect.getattr_static(_value(expression.value, frame), expression.attr, _NOTHING)
        return _NOTHING if _is_computed(held) else held
    if isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
        held = _value(expression.value, frame)
        return held.get(expression.slice.value, _NOTHING) if type(held) is dict else _NOTHING
    return _NOTHING
