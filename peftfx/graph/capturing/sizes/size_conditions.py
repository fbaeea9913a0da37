"""Size conditions: records the assumptions of a capture about sizes, and states them for named axes.

A capture runs a model's code with sizes that are symbols. Where the code compares sizes, torch answers for the
example's sizes and keeps a guard. It keeps no guard if the answer follows from its own assumption that no free size is
less than 2: so `if n == 1` leaves no guard. This module records both, by listening to torch's answers.
"""

from __future__ import annotations

import functools
import linecache
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

from peftfx.graph.capturing.loops.mask_loops import skips_a_turn
from peftfx.graph.conditions import Condition, unmet

_READ = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
_TORCH = str(Path(torch.__file__).parent)
_CAPTURING = str(Path(__file__).parents[1])  #: functions that stand in for torch's during a capture
_NN = str(Path(torch.nn.__file__).parent)
#: Files in which torch asks on behalf of a caller, whose frame is further out.
_BEARERS = tuple(
    str(Path(_TORCH, *parts))
    for parts in (
        ("__init__.py",),
        ("fx", "experimental", "sym_node.py"),
        ("fx", "experimental", "symbolic_shapes.py"),
        ("fx", "experimental", "recording.py"),
    )
)


@dataclass(frozen=True)
class Note:
    """An answer that a capture was given: the statement that was true, and the code that asked."""

    holds: sympy.Basic
    where: str
    code: bool
    edge: bool
    text: str


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
            if _is_asserted(sys._getframe(1)):
                return sympy.true  # the code accepts only values for which it is true
            if skips_a_turn(expr, _line(sys._getframe(1), 1)) or _only_raises(sys._getframe(1)):
                return sympy.false
            frame = sys._getframe(1)
            decided = None if decide is None else decide(expr, asked_at(frame), _asked_in(frame))
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


def _is_asserted(frame: FrameType | None) -> bool:
    """Return whether the model's code asks in an `assert`, which is true for all valid values."""
    return _line(frame, 0).strip().startswith("assert ")


def _only_raises(frame: FrameType | None) -> bool:
    """Return whether the model's code asks only to raise an error, which it does for no valid values."""
    turned = "not " in _line(frame, 0).replace(" is not ", " ")  # there, the answer that raises nothing is the other
    return raises_next(frame) and not turned and model_asks(frame)


def raises_next(frame: FrameType | None) -> bool:
    """Return whether the model's code asks in an `if` whose first line raises an error."""
    asks, then = _line(frame, 0).strip(), _line(frame, 1).strip()
    return asks.startswith("if ") and asks.endswith(":") and then.startswith("raise ")


def _line(frame: FrameType | None, after: int) -> str:
    """Return the line of the model's code that asks, or one after it."""
    frame = _behind(frame, _TORCH, _CAPTURING)
    return "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno + after)


def _notes(expr: sympy.Basic, result: object, guarded: bool) -> Iterator[Note]:
    if not getattr(expr, "free_symbols", None):
        return
    frame = sys._getframe(2)
    code = model_asks(frame)
    if guarded or code:  # torch's own operators are right at size 1, whatever they compare
        yield Note(_held(expr, result), asked_at(frame), code, not guarded, _asked_in(frame))


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


def model_asks(frame: FrameType | None) -> bool:
    """Return whether the model's Python code asked. Torch's operators ask to pick a kernel."""
    while frame is not None and (frame.f_code.co_filename in _BEARERS or _in_capture(frame)):
        frame = frame.f_back
    first = "" if frame is None else frame.f_code.co_filename
    return not first.startswith(_TORCH) or first.startswith(_NN)


def asked_at(frame: FrameType | None) -> str:
    """Return the line of the model's Python code that asked, or for which torch's operators asked."""
    frame = _behind(frame, _TORCH, _CAPTURING)
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _in_capture(frame: FrameType) -> bool:
    """Return whether this is code that stands for a function of torch during a capture, and asks for its caller."""
    return frame.f_code.co_filename.startswith(_CAPTURING)


def _asked_in(frame: FrameType | None) -> str:
    """Return the text of the line that `asked_at` names, as `quoted` gives it."""
    frame = _behind(frame, _TORCH, _CAPTURING)
    return "" if frame is None else quoted(linecache.getline(frame.f_code.co_filename, frame.f_lineno))


def _behind(frame: FrameType | None, *folders: str) -> FrameType | None:
    """Return the innermost frame whose code is in none of these folders."""
    while frame is not None and frame.f_code.co_filename.startswith(folders):
        frame = frame.f_back
    return frame


def quoted(line: str) -> str:
    """Return a line of code in brackets, for the end of a sentence that names its place, or nothing for no line."""
    text = line.strip().replace("`", "'")
    return f" (`{text if len(text) <= _WIDE else text[: _WIDE - 4] + ' ...'}`)" if text else ""


_WIDE = 100  #: the longest quotation of a line


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
            condition = Condition(_substituted(holds, known), note.where, code, edge)
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
        return condition.holds is sympy.true  # type: ignore[no-any-return]
    tried = list(condition.tried())
    if all(map(condition.met, tried)):
        return True
    allowed = [] if condition.code else [sizes for sizes in tried if not unmet(found, sizes)]
    return len(allowed) > _FEW and all(map(condition.met, allowed))


_FEW = 3  #: with so few tried sizes nothing is concluded
