"""Joined vectors: torch's attention with separate weights joins three biases and then splits them. This undoes both.

Each vector is then read directly, so that the layers which add them are sites as all others.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_aten = torch.ops.aten
_CUTS = {_aten.chunk.default, _aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default}


def read_apart(graph: fx.Graph) -> None:
    """Read each vector that was joined with others and split again directly, in place."""
    for node in graph.nodes:
        part = _before(node)
        if part is not None:
            node.replace_all_uses_with(part)


def _before(piece: fx.Node) -> fx.Node | None:
    """Return the vector before the join, if `piece` is cut from a row exactly where the vectors were joined."""
    cut = piece.args[0] if piece.target is operator.getitem else None
    if not isinstance(cut, fx.Node) or cut.target not in _CUTS:
        return None
    row, index = cut.args[0], piece.args[1]
    if not isinstance(row, fx.Node) or row.target is not _aten.cat.default or not isinstance(index, int):
        return None
    parts, pieces = row.args[0], cut.meta["val"]
    assert isinstance(parts, (list, tuple))
    shapes = [part.meta["val"].shape for part in parts if isinstance(part, fx.Node)]
    whole = len(shapes) == len(pieces) and all(len(s) == 1 and s == p.shape for s, p in zip(shapes, pieces))
    found = parts[index] if whole else None
    return found if isinstance(found, fx.Node) else None
