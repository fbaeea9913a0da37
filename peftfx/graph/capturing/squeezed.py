"""Squeezed axes: `squeeze` takes an axis away where its size is 1, and so does a graph only where it always is 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import SymInt, fx

from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
SQUEEZES = frozenset({_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims})


def squeezed_sizes(node: fx.Node) -> dict[int, int | SymInt]:
    """Return the sizes of the axes that the code squeezes, by axis."""
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    told = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes: Iterable[int] = (told,) if isinstance(told, int) else told  # type: ignore[assignment]
    return {axis % len(shape): shape[axis] for axis in axes if shape}


def _taken(node: fx.Node) -> list[int]:
    """Return the axes that the capture took away, the last first: those of size 1, and those that have to be 1.

    An axis of a free size is among them where the code goes on with an axis less. The capture then holds for calls in
    which that size is 1, which is among its conditions.
    """
    sizes = squeezed_sizes(node)
    ones = [axis for axis, size in sizes.items() if isinstance(size, int) and size == 1]
    less = node.args[0].meta["val"].ndim - node.meta["val"].ndim  # type: ignore[union-attr]
    if less > len(ones):
        ones += [axis for axis, size in sizes.items() if isinstance(size, SymInt) and size.node.hint == 1]
    return sorted(ones, reverse=True)


def squeeze_ones(rewriter: Rewriter, node: fx.Node) -> None:
    """Squeeze the axes of size 1 one by one. Axes whose size is free stay, also where it is 1 in a call.

    ONNX's Squeeze without axes would take a batch of one, and with an axis that is longer it fails.
    """
    x = node.args[0]
    ones = _taken(node)
    if not ones:
        rewriter.update(node, _aten.alias.default, x)
        return
    at = rewriter.before(node)
    for axis in ones[:-1]:
        x = at.call(_aten.squeeze.dim, x, axis)
    rewriter.update(node, _aten.squeeze.dim, x, ones[-1])


def keep_free_axes(graph: fx.Graph) -> Iterator[tuple[fx.Node, SymInt]]:
    """Keep the squeezed axes whose sizes are free, in place. Yield each size with its node: at 1 the code differs."""
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        if node.target in SQUEEZES:
            taken = _taken(node)
            free = [s for axis, s in squeezed_sizes(node).items() if isinstance(s, SymInt) and axis not in taken]
            yield from ((node, size) for size in free)
            if free:
                squeeze_ones(rewriter, node)
