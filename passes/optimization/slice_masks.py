"""A gather of everything in its order, by numbers that count rows and columns, as masks are read: slices."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.matching import operand, same_size

aten = torch.ops.aten
_Size = int | fx.Node


def slice_grid(rewriter: Rewriter, node: fx.Node) -> bool:
    """`x[i, j]`, where i counts from 0 along one axis of the result and j along a later one: slices of x from 0.

    What is counted is no longer than x, else the gather were an error; so the slices take as much.
    """
    if node.target is not aten.index.Tensor:
        return False
    x, indices = node.args
    counts = [_count(i, node) if isinstance(i, fx.Node) else None for i in indices]  # type: ignore[union-attr]
    found = [count for count in counts if count is not None]
    axes = [axis for axis, _ in found]
    if len(found) != x.meta["val"].ndim or axes != sorted(set(axes)):  # type: ignore[union-attr]
        return False
    taken = x
    for place, (axis, end) in enumerate(found):
        if not same_size(x, place, node, axis):  # type: ignore[arg-type]
            taken = _slice(rewriter, node, taken, place, axis, end)  # type: ignore[arg-type]
    for axis in (i for i in range(node.meta["val"].ndim) if i not in axes):
        taken = rewriter.before(node).call(aten.unsqueeze.default, taken, axis)
    rewriter.replace(node, taken)  # type: ignore[arg-type]
    return True


def _slice(rewriter: Rewriter, node: fx.Node, x: fx.Node, place: int, axis: int, end: _Size) -> fx.Node:
    sizes = list(x.meta["val"].shape)
    sizes[place] = node.meta["val"].shape[axis]
    value = x.meta["val"].new_empty(sizes)  # computed, it were a size of its own: the least of two
    return rewriter.before(node).call(aten.slice.Tensor, x, place, 0, end, value=value)


def _count(index: fx.Node, node: fx.Node) -> tuple[int, _Size] | None:
    """The axis of a gather's result along which an index counts from 0, and its end."""
    long = [axis for axis, size in enumerate(index.meta["val"].shape) if not (isinstance(size, int) and size == 1)]
    if len(long) != 1 or index.meta["val"].ndim != node.meta["val"].ndim:
        return None
    while index.target is aten.unsqueeze.default:
        index = operand(index)
    return (long[0], index.args[0]) if index.target is aten.arange.default else None  # type: ignore[return-value]
