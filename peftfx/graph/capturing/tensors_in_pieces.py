"""Tensors in pieces: reads the pieces of a tensor that is filled part by part, or joined and split again.

An empty tensor that is written piece by piece becomes the concatenation of its pieces. The keys of a latent attention
are made in this way: one part from the latent, one part rotated. A write into a view hides from the dataflow where
values come from, and the translation cannot know that nothing else uses the memory.

torch's attention with separate weights joins three biases and then splits them. Each vector is then read directly, so
that the layers which add them are sites as all others.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from peftfx.graph.rewriter import Rewriter
from peftfx.graph.written import as_written

_aten = torch.ops.aten
_EMPTY = {_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default}


class _Piece(NamedTuple):
    start: int
    end: int
    axis: int
    write: fx.Node


def concatenate_filled(graph: fx.Graph) -> None:
    """Replace each empty tensor by a concatenation, in place, if all pieces are written before any read."""
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        if node.target in _EMPTY and isinstance(node.meta["val"], torch.Tensor):
            _concatenate(rewriter, node)


def _concatenate(rewriter: Rewriter, empty: fx.Node) -> None:
    views = [user for user in empty.users if user.target is _aten.slice.Tensor]
    pieces = sorted(piece for view in views if (piece := _piece(empty, view)) is not None)
    readers = [user for user in empty.users if user not in views]
    if not readers or len(pieces) != len(views) or not _tile(pieces, empty):
        return
    last = max(piece.write for piece in pieces)
    if any(reader < last for reader in readers):
        return
    at = rewriter.after(last)
    writes = [piece.write for piece in pieces]
    parts = [as_written(rewriter.before(write), *write.args[:2]) for write in writes]  # type: ignore[arg-type]
    rewriter.replace(empty, at.call(_aten.cat.default, parts, pieces[0].axis), readers)
    for piece in pieces:
        view = piece.write.args[0]
        rewriter.erase(piece.write)
        while isinstance(view, fx.Node) and view is not empty and not view.users:
            source = view.args[0]
            rewriter.erase(view)
            view = source


def _piece(empty: fx.Node, view: fx.Node) -> _Piece | None:
    """Return the piece written through a view, if it is a fixed range of one axis and nothing else reads the view."""
    whole, cut = empty.meta["val"], None
    while True:
        axis, start, end, step = _bounds(view)
        if not isinstance(axis, int) or not isinstance(start, int) or not isinstance(end, int) or step != 1:
            return None
        size = whole.shape[axis]
        if not (start == 0 and end > 1 << 60):  # a cut
            if cut is not None or not isinstance(size, int):
                return None
            cut = (start % size if start < 0 else start, min(end % size if end < 0 else end, size), axis % whole.ndim)
        if len(view.users) != 1:
            return None
        (user,) = view.users
        if user.target is _aten.copy_.default and user.args[0] is view and not user.users:
            return None if cut is None else _Piece(cut[0], cut[1], cut[2], user)
        if user.target is not _aten.slice.Tensor:
            return None
        view = user


def _bounds(view: fx.Node) -> tuple[object, object, object, object]:
    given: list[object] = list(view.args[1:])
    axis, start, end, step = given + [0, None, None, 1][len(given) :]
    return axis, 0 if start is None else start, (1 << 62) if end is None else end, step


def _tile(pieces: list[_Piece], empty: fx.Node) -> bool:
    """Return whether the pieces are adjacent along one axis, and fill it."""
    if not pieces or len({piece.axis for piece in pieces}) != 1:
        return False
    ends = [0, *(piece.end for piece in pieces)]
    size = empty.meta["val"].shape[pieces[0].axis]
    return ends == [*(piece.start for piece in pieces), size]


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
