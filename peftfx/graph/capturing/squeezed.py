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


def squeeze_ones(rewriter: Rewriter, node: fx.Node) -> None:
    """Squeeze the axes of size 1 one by one. Axes whose size is free stay, also where it is 1 in a call.

    ONNX's Squeeze without axes would take a batch of one, and with an axis that is longer it fails.
    """
    x = node.args[0]
    ones = sorted((a for a, size in squeezed_sizes(node).items() if isinstance(size, int) and size == 1), reverse=True)
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
            free = [size for size in squeezed_sizes(node).values() if isinstance(size, SymInt)]
            yield from ((node, size) for size in free)
            if free:
                squeeze_ones(rewriter, node)
