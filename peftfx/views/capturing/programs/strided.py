"""Strided reads: `as_strided`, by which code makes windows that overlap, becomes a choice by indices.

What `as_strided` reads depends on where a tensor's elements lie. In a program that can differ from call to call: for a
batch of one row torch need not copy a tensor that it copies for two rows. In ONNX a tensor has no strides. A choice by
indices reads the same elements wherever they lie.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Sequence

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftfx.graph.rewriter import Cursor, Rewriter
from peftfx.graph.written import MEMORY, memory_of, written_by

_aten = torch.ops.aten
_Size = int | SymInt


def choose_by_indices(graph: fx.Graph) -> None:
    """Replace strided reads, in place, that keep a tensor's first and last axes, and read rows of those between.

    A tensor that is written into after the read keeps it, because the read is a view. What the capture has noted of
    memory is forgotten.
    """
    rewriter, written = Rewriter(graph), dict[int, fx.Node]()
    for node in graph.nodes:
        written.update((memory, node) for value in written_by(node) for memory in memory_of(value))
    for node in list(graph.find_nodes(op="call_function", target=_aten.as_strided.default)):
        if not any(memory in written and written[memory] > node for memory in memory_of(node)):
            _replace(rewriter, node)
    for node in graph.nodes:
        node.meta.pop(MEMORY, None)


def _replace(rewriter: Rewriter, node: fx.Node) -> None:
    source, sizes, strides, *offset = node.args
    assert isinstance(source, fx.Node)
    value, wanted = source.meta["val"], [_value(stride) for stride in strides]  # type: ignore[union-attr]
    if any(start is not None for start in offset):
        return
    shape = [_value(size) for size in sizes]  # type: ignore[union-attr]
    found = _middle(value, shape, wanted)
    if found is None:
        return
    first, last, steps = found
    at = rewriter.before(node)
    shapes = value.fake_mode.shape_env
    # The choice is right for all sizes. What its operators ask of the example's sizes is no condition.
    with value.fake_mode, shapes.suppress_guards() if shapes else contextlib.nullcontext():
        joined = source
        if value.ndim - last - first > 1:
            joined = at.call(_aten.flatten.using_ints, source, first, value.ndim - last - 1)
        index = _index(at, value.device, sizes[first : len(shape) - last], steps)  # type: ignore[index, arg-type]
        chosen = at.call(_aten.index_select.default, joined, first, index)
        rewriter.replace(node, at.call(_aten.view.default, chosen, sizes))
    rewriter.erase(node)


def _index(at: Cursor, device: torch.device, sizes: Sequence[int | fx.Node], steps: Sequence[int]) -> fx.Node:
    """Return the rows that are read, one after the other: the sums of each axis' positions times its step."""
    count = functools.reduce(lambda one, other: at.call(operator.mul, one, other), sizes)
    rest = at.call(_aten.arange.default, count, dtype=torch.int64, device=device, pin_memory=False)
    index: fx.Node | None = None
    for axis, (size, step) in reversed(list(enumerate(zip(map(_known, sizes), steps, strict=True)))):
        position = at.call(_aten.remainder.Scalar, rest, size) if axis else rest
        part = position if step == 1 else at.call(_aten.mul.Tensor, position, step)
        index = part if index is None else at.call(_aten.add.Tensor, index, part)
        rest = at.call(_aten.div.Scalar_mode, rest, size, rounding_mode="floor") if axis else rest
    assert index is not None
    return index


def _middle(value: Tensor, shape: Sequence[_Size], strides: Sequence[_Size]) -> tuple[int, int, list[int]] | None:
    """Return how many first and last axes stay, and the steps of the axes between, counted in rows of the tensor."""
    most = min(value.ndim, len(shape)) - 1
    first = last = 0

    def stays(axis: int, other: int) -> bool:
        return _same(value.shape[axis], shape[other]) and _same(value.stride(axis), strides[other])

    while first < most and stays(first, first):
        first += 1
    while last < most - first and stays(-1 - last, -1 - last):
        last += 1
    while last >= 0:
        end = value.ndim - last
        row = value.stride(end - 1)
        steps = [_times(stride, row) for stride in strides[first : len(shape) - last]]
        joined = all(
            _same(value.stride(axis), value.stride(axis + 1) * value.shape[axis + 1]) for axis in range(first, end - 1)
        )
        if joined and all(step is not None for step in steps):
            return first, last, [step for step in steps if step is not None]
        last -= 1
    return None


def _times(stride: _Size, row: _Size) -> int | None:
    """Return how many times a row's stride a stride is, if that is a whole number for all sizes."""
    one, other = map(_simplified, (stride, row))
    times = sympy.S.Zero if other == 0 else one / other
    return int(times) if times.is_Integer and times > 0 else None


def _known(size: int | fx.Node) -> int | fx.Node:
    """Return a size as a number, if the conditions of the capture leave one; else its node."""
    found = _simplified(_value(size))
    return int(found) if found.is_Integer else size


def _same(one: _Size, other: _Size) -> bool:
    return statically_known_true(one == other) or _simplified(one) == _simplified(other)


def _simplified(size: _Size) -> sympy.Expr:
    """Return a size as the conditions of the capture leave it: where `s % 4 == 0`, `s // (s // 4)` is 4.

    torch records such a condition, and does not simplify by it.
    """
    if isinstance(size, int):
        return sympy.Integer(size)
    expr, counts = size.node.expr, dict[sympy.Symbol, sympy.Integer]()
    for condition in size.node.shape_env.divisible:
        value, divisor = condition.args
        factor, symbol = value.as_coeff_Mul()
        if divisor.is_Integer and factor.is_Integer and symbol.is_Symbol:
            least = divisor / sympy.gcd(factor, divisor)
            counts[symbol] = sympy.ilcm(counts.get(symbol, 1), least)
    whole = {s: count * sympy.Symbol(f"{s}/{count}", integer=True, positive=True) for s, count in counts.items()}
    return expr.xreplace(whole)


def _value(size: object) -> _Size:
    found = size.meta["val"] if isinstance(size, fx.Node) else size
    assert isinstance(found, int | SymInt)
    constant = None if isinstance(found, int) else found.node.maybe_as_int()
    return found if constant is None else constant
