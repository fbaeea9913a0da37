"""Trace: makes a plain torch function of fake tensors a graph that serves all sizes."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import sympy
import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ShapeGuard, free_unbacked_symbols  # type: ignore[attr-defined]
from torch.utils._sympy.functions import Max, Min, Mod, PythonMod
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from peftfx.errors import PeftfxError
from peftfx.graph.capturing.loops.recurrent_layers import recurrent_layers

_TORCH = str(Path(torch.__file__).parent)
_DEF = re.compile(r"\s*def (\w+)")
_ASSERTS = str(Path(torch.nn.modules.module.__file__))  #: runs the module with a program's own guards

#: Words in the names of torch's functions that compare strides. `should_fold` does so to pick a kernel of a product.
_OF_STRIDES = ("contiguous", "strides", "dense", "should_fold")


def trace(function: Callable[..., object], values: Sequence[object], name: str, where: str) -> fx.GraphModule:
    """Trace a function of fake tensors. A graph that holds only for some sizes is refused."""
    refuse_transformed(values, where)
    with asked_of_sizes(values) as asked, recurrent_layers():
        graph = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*map(_laid_out, values))
    for guard in asked:
        if _binds(guard):
            what = f"{name} branches on a shape: {guard.expr}"
            raise PeftfxError(what, where, "write it without the branch: one trace serves all sizes")
    graph.graph.eliminate_dead_code()
    return graph


def _laid_out(value: object) -> object:
    """Return a value of a trace; a tensor whose strides follow from the values of others is laid out in one piece.

    Such is the last of the rows that a mask chooses. torch 2.15 asks of its strides where a trace begins, and cannot
    tell. A trace serves tensors of the same sizes, however they lie in memory.
    """
    if not isinstance(value, Tensor) or not free_unbacked_symbols([*value.stride(), value.storage_offset()]):
        return value
    return value.new_empty(value.shape).requires_grad_(value.requires_grad)


def refuse_transformed(values: Iterable[object], where: str) -> None:
    """Refuse values of a graph that the model's code computes inside a transform of `torch.func`, such as `vmap`.

    Such a value stands for one row, or for a pair of a value and its tangent. A node outside of the transform cannot
    read it.
    """
    if any(isinstance(v, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v) for v in values):
        what = "the model's code computes this inside torch.vmap, or another transform of torch.func"
        raise PeftfxError(what, where, "write it for a whole batch: what a transform holds has no place in a graph")


@contextmanager
def asked_of_sizes(values: Sequence[object]) -> Iterator[list[ShapeGuard]]:
    """Yield a list that has in the end what torch took for true of the sizes of these fake tensors inside.

    What the ranges of the sizes say already is left out. So is what a program asserts of its inputs when it runs: that
    says how it was captured.
    """
    asked: list[ShapeGuard] = []
    env = _sizes_of([v for v in values if isinstance(v, Tensor)])
    before, ranges = (0, {}) if env is None else (len(env.guards), dict(env.var_to_range))
    yield asked
    if env is not None:
        new = (guard for guard in env.guards[before:] if _asking_file(guard) != _ASSERTS)
        asked += [guard for guard in new if not _always(guard.expr, ranges)]


@contextmanager
def forgetting_sizes(values: object) -> Iterator[None]:
    """Forget the sizes that values decide which come up inside, where nothing holds them: the next trace would fail.

    Args:
        values: fake tensors, at any depth, that share their sizes' symbols with what is computed inside.
    """
    env = _sizes_of(values)
    pending = [] if env is None else env.pending_fresh_unbacked_symbols
    before = len(pending)
    try:
        yield
    finally:
        del pending[before:]


def _sizes_of(values: object) -> ShapeEnv | None:
    """Return what torch knows of the sizes of fake tensors."""
    mode = detect_fake_mode(values)
    return None if mode is None else mode.shape_env


def splits(asked: Sequence[ShapeGuard], axes: Mapping[str, str] | None = None) -> sympy.Basic | None:
    """Return the first statement with `==`, `!=` or the rest of a division that some large sizes do not meet, or None.

    One that only small sizes do not meet is no branch that matters: torch saves an operation at a size of 1. Others
    (`<`) pick a kernel, or say what the model's code takes, as in `_binds`. An export is verified at small sizes.

    Args:
        asked: what torch took for true.
        axes: the names of the sizes' axes, by symbol. Sizes of one name are equal.
    """
    names = axes or {}
    stated = (g.expr for g in asked if isinstance(g.expr, sympy.Eq | sympy.Ne) or g.expr.has(Mod, PythonMod))
    return next((expr for expr in stated if not all(map(expr.xreplace, _tried(expr, names)))), None)


def _tried(expr: sympy.Basic, axes: Mapping[str, str]) -> Iterator[dict[sympy.Basic, sympy.Integer]]:
    """Yield large sizes for the symbols of a statement. Those of different axes differ in most."""
    symbols = sorted(expr.free_symbols, key=str)
    places = {name: i for i, name in enumerate(dict.fromkeys(axes.get(str(s), str(s)) for s in symbols))}
    for first in (*range(512, 544), 1000, 4097, 100003):
        for step in (0, 1, 5, 1009):
            yield {s: sympy.Integer(first + step * places[axes.get(str(s), str(s))]) for s in symbols}


def _binds(guard: ShapeGuard) -> bool:
    """Return whether a guard makes the trace valid only for some sizes.

    torch's own operators compare sizes too, to pick a kernel or a memory format. Their inequalities do not limit the
    trace. Their equalities do (a broadcast against a fixed size), unless they only say that a size is at least 1, or
    compare strides: those of an image that has become one pixel are equal.
    """
    inside = _asking_file(guard).startswith(_TORCH)
    if inside and _compares_strides(guard):
        return False
    expr = guard.expr.replace(Max, lambda *sizes: sizes[1] if len(sizes) == 2 and sizes[0] == 1 else Max(*sizes))
    return not inside or isinstance(expr, sympy.Eq)


def _compares_strides(guard: ShapeGuard) -> bool:
    """Return whether torch asked of strides: to pick a kernel, or whether a product's operand is folded as a view."""
    name = _asking_function(guard)
    if name == "matmul":  # the rule of a whole product: the trace has the product, and not the folding
        return ".reshape(" in linecache.getline(_asking_file(guard), _line(guard))
    return any(word in name for word in _OF_STRIDES)


def _line(guard: ShapeGuard) -> int:
    return int(getattr(guard.sloc.framework_loc, "lineno", 0) or 0)


def _asking_file(guard: ShapeGuard) -> str:
    """Return the file of torch that asked."""
    place = guard.sloc.framework_loc
    return str(getattr(place, "filename", place))


def _asking_function(guard: ShapeGuard) -> str:
    """Return the name of torch's function that asked; of what has none, such as `<genexpr>`, of the one around it."""
    place = guard.sloc.framework_loc
    name = str(getattr(place, "name", ""))
    if not name.startswith("<"):
        return name
    before = linecache.getlines(_asking_file(guard))[: _line(guard)]
    return next((found[1] for line in reversed(before) if (found := _DEF.match(line))), name)


def _always(expr: sympy.Basic, ranges: Mapping[sympy.Symbol, ValueRanges[sympy.Expr]]) -> bool:
    """Return whether the ranges of the sizes already say that a statement is true."""
    known = {symbol: ranges.get(symbol, ValueRanges.unknown_int()) for symbol in expr.free_symbols}
    larger = expr.replace(Max, lambda *sizes: Max(*_extreme(sizes, lambda one, other: _covers(other, one, known))))
    decided = larger.replace(Min, lambda *sizes: Min(*_extreme(sizes, lambda one, other: _covers(one, other, known))))
    return decided is sympy.true or bound_sympy(decided, known).lower is sympy.true


def _extreme(sizes: Sequence[sympy.Expr], yields: Callable[[sympy.Expr, sympy.Expr], bool]) -> list[sympy.Expr]:
    """Return the sizes that may be the extreme one: without those that yield to another."""
    kept = list(sizes)
    for size in sizes:
        if any(yields(size, other) for other in kept if other != size):
            kept.remove(size)
    return kept


def _covers(one: sympy.Expr, other: sympy.Expr, ranges: Mapping[sympy.Symbol, ValueRanges[sympy.Expr]]) -> bool:
    """Return whether a size is never below another, as `32 * n` and `8 * n`, or `n * m` and `n`."""
    known = dict(ranges)
    if bound_sympy(sympy.expand(one - other), known).lower >= 0:
        return True
    if other == 0:  # which no number of times makes a size
        return False
    times, rest = (one / other).as_numer_denom()
    return rest == 1 and bound_sympy(other, known).lower >= 0 and bound_sympy(times, known).lower >= 1
