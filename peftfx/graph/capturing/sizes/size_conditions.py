"""Size conditions: records the assumptions of a capture about sizes, and states them for named axes.

A capture runs a model's code with sizes that are symbols. Where the code compares sizes, torch answers for the
example's sizes and keeps a guard. It keeps no guard if the answer follows from its own assumption that no free size is
less than 2: so `if n == 1` leaves no guard. This module records both, by listening to torch's answers.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

from peftfx.graph.capturing.loops.mask_loops import skips_a_turn
from peftfx.graph.capturing.sizes.asking_code import (
    asked_at,
    is_asserted,
    line_asked,
    line_of_code,
    model_asks,
    only_raises,
)
from peftfx.graph.conditions import Condition, unmet

_READ = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)


@dataclass(frozen=True)
class Note:
    """An answer that a capture was given: the statement that was true, and the code that asked; see `Condition`."""

    holds: sympy.Basic
    where: str
    code: bool
    edge: bool
    text: str
    below: bool = False


Decide = Callable[[sympy.Basic, str, str], sympy.Basic | None]
"""A function that gives the value of an expression with a boolean that was read from a tensor, for a line of code that
asks, by its place and its quoted text; None if it has no value."""


@contextmanager
def noted(decide: Decide | None = None) -> Iterator[list[Note]]:
    """Record the assumptions of this thread's captures in the yielded list. Not for two threads at once.

    Args:
        decide: decides what code asks of values; without it, or if it gives None, torch refuses.
    """
    notes: list[Note] = []
    own, answer = threading.get_ident(), ShapeEnv.evaluate_expr

    def listen(env: ShapeEnv, expr: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        if threading.get_ident() != own:
            return answer(env, expr, *args, **kwargs)
        before = len(env.guards)
        if _of_values(expr):
            if is_asserted(sys._getframe(1)):
                return sympy.true  # the code accepts only values for which it is true
            if skips_a_turn(expr, line_of_code(sys._getframe(1), 1)) or only_raises(sys._getframe(1)):
                return sympy.false
            frame = sys._getframe(1)
            decided = None if decide is None else decide(expr, asked_at(frame), line_asked(frame))
            if decided is not None:
                return decided
        result = answer(env, expr, *args, **kwargs)
        guarded = len(env.guards) > before
        if guarded or _differs_at_1(expr, result):
            notes.extend(_notes(expr, result, guarded))
        return result

    ShapeEnv.evaluate_expr = listen  # type: ignore[method-assign, assignment]
    try:
        yield notes
    finally:
        ShapeEnv.evaluate_expr = answer  # type: ignore[method-assign]


@functools.lru_cache(4096)  # of some hundred questions, each is asked some hundred times
def _of_values(expr: object) -> bool:
    """Return whether an expression contains a number that was read from a tensor."""
    return any(symbol_is_type(s, _READ) for s in getattr(expr, "free_symbols", ()) if isinstance(s, sympy.Symbol))


def _notes(expr: sympy.Basic, result: object, guarded: bool) -> Iterator[Note]:
    if not getattr(expr, "free_symbols", None):
        return
    frame = sys._getframe(2)
    code = model_asks(frame)
    if guarded or code:  # torch's own operators are right at size 1, whatever they compare
        yield Note(_held(expr, result), asked_at(frame), code, not guarded, line_asked(frame))


def _held(expr: sympy.Basic, result: object) -> sympy.Basic:
    if result == sympy.true or result is True:
        return expr
    if result == sympy.false or result is False:
        return sympy.Not(expr)
    return sympy.Eq(expr, result)


@functools.lru_cache(4096)
def _differs_at_1(expr: sympy.Basic, result: object) -> bool:
    """Return whether the answer would be different for a size of 1."""
    symbols = list(getattr(expr, "free_symbols", ()))
    if not symbols:
        return False
    other = sympy.false if result in (sympy.true, True) else sympy.true
    return any(_at_1(expr, choice) == other for choice in (*([symbol] for symbol in symbols), symbols))


def _at_1(expr: sympy.Basic, symbols: Sequence[sympy.Basic]) -> sympy.Basic | None:
    try:
        return expr.xreplace(dict.fromkeys(symbols, sympy.Integer(1)))
    except (AssertionError, ZeroDivisionError):  # the expression divides by 0 at these sizes
        return None


def fixed_by(notes: Sequence[Note], symbol: sympy.Basic, size: int) -> str:
    """Return the line of code that fixed an axis, its place and text, or nothing: where no other size was right.

    Args:
        notes: the notes in order.
        symbol: the symbol of the axis.
        size: the size at which it was fixed.
    """
    said = (note for note in notes if note.where and isinstance(note.holds, sympy.Eq))
    return next((f"{note.where}{note.text}" for note in said if _fixes(note.holds, symbol, size)), "")


def _fixes(holds: sympy.Basic, symbol: sympy.Basic, size: int) -> bool:
    if symbol not in holds.free_symbols:
        return False
    at = {
        other: holds.xreplace({symbol: sympy.Integer(other)}) == sympy.true
        for other in (size, size + 1, size + 2, 2 * size + 1, 4 * size)
    }
    return at.pop(size) and not any(at.values())


def conditions_of(notes: Sequence[Note], axes: Mapping[str, str | int]) -> tuple[Condition, ...]:
    """Return a capture's notes as statements about its axes, each once, without those that are always true.

    Args:
        notes: the notes in order.
        axes: the name of each free axis, by the name of its symbol, or its size if the code has fixed the axis. Symbols
            of one name have one size.
    """
    names = {
        name: sympy.Integer(axis) if isinstance(axis, int) else sympy.Symbol(axis, integer=True, positive=True)
        for name, axis in axes.items()
    }
    said: dict[tuple[sympy.Basic, bool, bool], Note] = {}
    for note in notes:
        symbols = {symbol: names.get(str(symbol)) for symbol in note.holds.free_symbols}
        if None not in symbols.values():  # leave out sizes of another capture
            said.setdefault((note.holds.xreplace(symbols), note.code, note.edge), note)
    order = {str(axis): i for i, axis in reversed(list(enumerate(axes.values())))}
    found, known = list[Condition](), dict[sympy.Basic, sympy.Basic]()
    for relations in (True, False):  # relations first: a statement that follows from them is left out
        for (holds, code, edge), note in said.items():
            condition = Condition(_substituted(holds, known), note.where, code, edge, note.below)
            kept = code or not isinstance(condition.holds, sympy.Ne)  # `!=` in an operator only chooses a faster way
            if condition.relation == relations and kept and condition not in found and not _follows(condition, found):
                found.append(condition)
                known |= _solved(condition, order) if relations else {}
    return tuple(found)


def _solved(relation: Condition, order: Mapping[str, int]) -> dict[sympy.Basic, sympy.Basic]:
    """Return the last axis of a relation as an expression of the axes before it."""
    left, right = relation.holds.args
    pairs = [(one, other) for one, other in ((left, right), (right, left)) if one.is_Symbol]
    pairs.sort(key=lambda pair: order[str(pair[0])], reverse=True)
    return next(({one: other} for one, other in pairs if one not in other.free_symbols), {})


def _substituted(holds: sympy.Basic, known: Mapping[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    for _ in known:
        holds = holds.xreplace(dict(known))
    return holds


def _follows(condition: Condition, found: Sequence[Condition]) -> bool:
    """Return whether a statement is true at all tried sizes; an operator's: at all that meet the other conditions."""
    if not condition.axes:
        return condition.holds is sympy.true
    tried = list(condition.tried())
    if all(map(condition.met, tried)):
        return True
    allowed = [] if condition.code else [sizes for sizes in tried if not unmet(found, sizes)]
    return len(allowed) > _FEW and all(map(condition.met, allowed))


_FEW = 3  #: with so few tried sizes nothing is concluded
