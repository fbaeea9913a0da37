"""Empty sizes: records where a model's code asks whether an axis is empty, while a capture has it filled.

Code may compute something else for the first tokens, `if past_length > 0`. In a capture every free size counts as 2 or
more, so torch answers such a question at once, and keeps no guard.
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
from torch import SymInt
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
    own, kept = threading.get_ident(), {name: getattr(SymInt, name) for name in _QUESTIONS}

    def asking(name: str) -> object:
        def ask(size: SymInt, other: object) -> Any:
            answer = kept[name](size, other)
            if threading.get_ident() == own and (symbols := _decide(name, _expression(size), _expression(other))):
                frame = sys._getframe(1)
                # A cache without tokens has no keys yet: its code makes them.
                if model_asks(frame) and not (where := asked_at(frame)).startswith(_CACHES):
                    for question in (Question(symbol, where) for symbol in symbols):
                        if question not in found:
                            found[question] = None
                            yielded.append(question)
            return answer

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


@functools.lru_cache(4096)
def _decide(name: str, left: object, right: object) -> tuple[sympy.Basic, ...]:
    """Return the symbols that decide a question by being 0, where all other sizes are not."""
    if left is None or right is None:
        return ()
    ask = _QUESTIONS[name]
    sides = sympy.sympify(left), sympy.sympify(right)
    usual = ask(*sides)
    if usual not in (sympy.true, sympy.false):
        return ()

    def at_0(symbol: sympy.Basic) -> object:
        try:
            return ask(*(side.xreplace({symbol: sympy.Integer(0)}) for side in sides))
        except ZeroDivisionError:  # the code divides by the size
            return None

    return tuple(s for s in sides[0].free_symbols | sides[1].free_symbols if at_0(s) == sympy.Not(usual))


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
