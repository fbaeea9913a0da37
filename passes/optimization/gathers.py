"""Replace gathers that read entries in order by slices: those of masks, and of the parts of a fused projection."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.matching import operand, same_size

aten = torch.ops.aten
_Size = int | fx.Node


def slice_grid(rewriter: Rewriter, node: fx.Node) -> bool:
    """Replace `x[i, j]`, with i and j counting from 0 along two axes of the result, by slices of x from 0.

    The counts are not longer than x: otherwise the gather would be an error. So the slices take as many entries.
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


def slice_run(rewriter: Rewriter, node: fx.Node, graph: Graph) -> bool:
    """Replace `x[:, :, [-2, -1]]`, with constant numbers that follow each other along one axis, by a slice of x.

    The size of the axis is known: with a free size, numbers that count from the end would not say where they begin.
    """
    if node.target is not aten.index.Tensor:
        return False
    x, indices = node.args
    chosen = [(axis, index) for axis, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if len(chosen) != 1 or chosen[0][1].op != "get_attr":
        return False
    ((axis, index),) = chosen
    size, numbers = x.meta["val"].shape[axis], graph.get(str(index.target))  # type: ignore[union-attr]
    if not isinstance(size, int) or numbers.ndim != 1 or numbers.dtype is torch.bool or not len(numbers):
        return False
    first, *more = (int(number) + size * (number < 0) for number in numbers.tolist())
    if more != list(range(first + 1, first + len(numbers))):
        return False
    taken = rewriter.before(node).call(aten.slice.Tensor, x, axis, first, first + len(numbers))
    rewriter.replace(node, taken)
    return True


def _slice(rewriter: Rewriter, node: fx.Node, x: fx.Node, place: int, axis: int, end: _Size) -> fx.Node:
    sizes = list(x.meta["val"].shape)
    sizes[place] = node.meta["val"].shape[axis]
    value = x.meta["val"].new_empty(sizes)  # a computed slice would get a size of its own: the minimum of two sizes
    return rewriter.before(node).call(aten.slice.Tensor, x, place, 0, end, value=value)


def _count(index: fx.Node, node: fx.Node) -> tuple[int, _Size] | None:
    """Return the axis of a gather's result along which an index counts from 0, and its end; or None."""
    long = [axis for axis, size in enumerate(index.meta["val"].shape) if not (isinstance(size, int) and size == 1)]
    if len(long) != 1 or index.meta["val"].ndim != node.meta["val"].ndim:
        return None
    while index.target is aten.unsqueeze.default:
        index = operand(index)
    return (long[0], index.args[0]) if index.target is aten.arange.default else None  # type: ignore[return-value]
