"""Empty sizes: records where a model's code asks whether an axis is empty, while a capture has it filled.

Code may compute something else for the first tokens, `if past_length > 0`. In a capture every free size counts as 2 or
more, so torch answers such a question at once, and keeps no guard.

A capture compares sizes tens of thousands of times, and makes a few hundred different comparisons. What torch knows
without a guard is remembered, because torch takes longer to find it than all else that a comparison does.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
from torch import SymBool, SymInt, sym_not
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import cache_utils

from peftfx.graph.capturing.sizes.asking_code import asked_at, model_asks
from peftfx.graph.conditions import Condition

_QUESTIONS = {
    "__eq__": sympy.Eq,
    "__ne__": sympy.Ne,
    **{f"__{name}__": getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
}


@dataclass(frozen=True)
class Question:
    """A comparison of sizes by the model's code: its answer is another where the axis of `symbol` is empty."""

    symbol: sympy.Basic
    where: str


@contextmanager
def asked_if_empty() -> Iterator[list[Question]]:
    """Record the questions of this thread's captures in the yielded list. Not for two threads at once."""
    found: dict[Question, None] = {}
    yielded: list[Question] = []
    known: dict[tuple[object, ...], bool | None] = {}
    own, kept = threading.get_ident(), {name: getattr(SymInt, name) for name in _QUESTIONS}

    asks = False  # whether torch answers: to record a comparison as a node, it compares once more

    def torchs(name: str, size: SymInt, other: object) -> Any:
        nonlocal asks
        asks = True
        try:
            return kept[name](size, other)
        finally:
            asks = False

    def record(symbols: Sequence[sympy.Basic], where: str) -> None:
        if where.startswith(_CACHES):  # a cache without tokens has no keys yet: its code makes them
            return
        for question in (Question(symbol, where) for symbol in symbols):
            if question not in found:
                found[question] = None
                yielded.append(question)

    def asking(name: str) -> object:
        def ask(size: SymInt, other: object) -> Any:
            if asks or threading.get_ident() != own:
                return kept[name](size, other)
            left, right = _expression(size), _expression(other)
            usual, symbols = _decide(name, left, right)
            frame = sys._getframe(1)
            if usual is not None:
                if symbols and model_asks(frame):
                    record(symbols, asked_at(frame))
                return usual
            if left is None or right is None or model_asks(frame):  # `noted` listens to torch's answers to the model
                return torchs(name, size, other)
            key = name, size.node.shape_env, left, right
            if key not in known:
                known[key] = _without_guard(torchs(name, size, other))
            answer = known[key]
            return torchs(name, size, other) if answer is None else answer

        return ask

    for name in kept:
        setattr(SymInt, name, asking(name))
    try:
        yield yielded
    finally:
        for name, method in kept.items():
            setattr(SymInt, name, method)


_CACHES = cache_utils.__name__.rpartition(".")[2] + ".py:"


def _expression(value: object) -> object:
    return value.node.expr if isinstance(value, SymInt) else value if isinstance(value, int) else None


def _without_guard(answer: object) -> bool | None:
    """Return an answer that holds for all sizes that torch allows; None if there is none, and a guard would be kept."""
    if not isinstance(answer, SymBool):
        return answer if isinstance(answer, bool) else None
    if statically_known_true(answer):
        return True
    return False if statically_known_true(sym_not(answer)) else None


@functools.lru_cache(4096)
def _decide(name: str, left: object, right: object) -> tuple[bool | None, tuple[sympy.Basic, ...]]:
    """Return the answer that holds for all sizes from 1, if there is one, and the symbols that change it by being 0."""
    if left is None or right is None:
        return None, ()
    ask = _QUESTIONS[name]
    sides = sympy.sympify(left), sympy.sympify(right)
    usual = ask(*sides)
    if usual not in (sympy.true, sympy.false):
        return None, ()

    def at_0(symbol: sympy.Basic) -> object:
        try:
            return ask(*(side.xreplace({symbol: sympy.Integer(0)}) for side in sides))
        except ZeroDivisionError:  # the code divides by the size
            return None

    symbols = sides[0].free_symbols | sides[1].free_symbols
    return usual == sympy.true, tuple(s for s in symbols if at_0(s) == sympy.Not(usual))


def filled_of(
    questions: Sequence[Question], axes: Mapping[str, str | int], may_be_empty: frozenset[str]
) -> tuple[Condition, ...]:
    """Return the questions as statements that an axis is not empty, each axis once, by the first code that asked.

    Args:
        questions: the questions in order.
        axes: the name of each free axis, by the name of its symbol, or its size if the code has fixed the axis.
        may_be_empty: the names of axes that are empty in some calls.
    """
    first: dict[str, str] = {}
    for question in questions:
        axis = axes.get(str(question.symbol))
        if isinstance(axis, str) and axis in may_be_empty:
            first.setdefault(axis, question.where)
    symbols = ((sympy.Symbol(axis, integer=True, nonnegative=True), where) for axis, where in first.items())
    return tuple(Condition(symbol > 0, where, code=True) for symbol, where in symbols)
