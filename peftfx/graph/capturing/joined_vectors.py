"""joined vectors: torch's own attention with separate weights joins its three biases, only to take them apart again.

Each is read as it is instead, so that the layers which add them are sites as any others.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_aten = torch.ops.aten
_CUTS = {_aten.chunk.default, _aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default}


def read_apart(graph: fx.Graph) -> None:
    """Read each vector that was joined with others and cut out again as it was before; in place."""
    for node in graph.nodes:
        part = _before(node)
        if part is not None:
            node.replace_all_uses_with(part)


def _before(piece: fx.Node) -> fx.Node | None:
    """The vector that this is a piece of a row of, if the row is cut where it was joined."""
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
