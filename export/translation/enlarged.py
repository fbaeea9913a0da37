"""Pictures and sounds that are enlarged by a factor between 1 and 2.

An axis of few values is as long after as before: `floor(3 * 1.25)` is 3. ONNX Runtime's `Resize` copies a tensor all of
whose axes keep their size, and samples each axis otherwise. torch copies each axis that keeps its size, but for cubic
splines, where it always samples. So axes are enlarged one after another; or, for splines, they get copies of their last
value, which torch takes for what is behind the end, until they grow, and the result is cut.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from peftfx.graph.rewriter import Cursor, Rewriter

_aten = torch.ops.aten
_BY_AXES = {
    *(_aten.upsample_nearest2d.vec, _aten.upsample_nearest3d.vec, _aten._upsample_nearest_exact2d.vec),
    *(_aten.upsample_bilinear2d.vec, _aten.upsample_trilinear3d.vec),
}
_SPLINES = {_aten.upsample_bicubic2d.vec}
_SOUNDS = {
    _aten.upsample_nearest1d.vec: _aten.upsample_nearest2d.vec,
    _aten._upsample_nearest_exact1d.vec: _aten._upsample_nearest_exact2d.vec,
    _aten.upsample_linear1d.vec: _aten.upsample_bilinear2d.vec,
}


def widen_sounds(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """Make a sound a picture of one row where its length changes: torch's exporter knows pictures. Return the change.

    Other nodes are returned as they are.
    """
    if node.target not in _SOUNDS or node.kwargs:
        return node
    value, sizes, *options, factors = node.args
    at = rewriter.before(node)
    picture = at.call(_aten.unsqueeze.default, value, -2)
    sizes, factors = sizes and [1, *sizes], factors and [1.0, *factors]  # type: ignore[misc]
    result = node.meta["val"].unsqueeze(-2)
    wide = at.call(_SOUNDS[node.target], picture, sizes, *options, factors, value=result)
    rewriter.replace(node, at.call(_aten.squeeze.dim, wide, -2))
    return wide


def enlarge_as_torch(rewriter: Rewriter, node: fx.Node) -> bool:
    """Replace an enlargement whose axes may keep their size. Return whether the node was one."""
    if node.target not in _BY_AXES | _SPLINES or node.kwargs:
        return False
    value, *options, factors = node.args
    if not isinstance(value, fx.Node) or not isinstance(factors, (list, tuple)) or True in options:
        return False  # with `align_corners` the factor is that of the sizes
    first = value.meta["val"].ndim - len(factors)
    grown = {first + i: f for i, f in enumerate(factors) if isinstance(f, float) and 1 < f < 2}
    if not grown:
        return False
    at, users = rewriter.after(node), list(node.users)  # behind the node, whose size is that of the result
    if node.target in _SPLINES:
        result = _enlarged(at, node.target, _lengthened(at, value, grown), options, factors)
        for axis in grown:
            result = at.call(_aten.slice.Tensor, result, axis, 0, at.call(_aten.sym_size.int, node, axis))
    else:
        result = value
        for axes in ([axis for axis in range(first, first + len(factors)) if axis not in grown], *([a] for a in grown)):
            if axes:
                own = [f if first + i in axes else 1.0 for i, f in enumerate(factors)]
                result = _enlarged(at, node.target, result, options, own)
    rewriter.replace(node, result, users)
    return True


def _enlarged(at: Cursor, target: object, value: fx.Node, options: Sequence[Any], factors: Sequence[Any]) -> fx.Node:
    """Enlarge the last axes. Outside of a capture, torch would compute a value of the example's sizes alone."""
    shape = list(value.meta["val"].shape)
    for axis, factor in enumerate(factors, start=len(shape) - len(factors)):
        shape[axis] = shape[axis] if factor == 1 else torch.sym_int(shape[axis] * factor)
    return at.call(target, value, *options, factors, value=value.meta["val"].new_empty(shape))


def _lengthened(at: Cursor, value: fx.Node, grown: Mapping[int, float]) -> fx.Node:
    """Return a tensor with so many copies of the last values of each axis that it grows, whatever its size."""
    ndim = value.meta["val"].ndim
    for axis, factor in grown.items():
        last = at.call(_aten.slice.Tensor, value, axis, -1, sys.maxsize)
        times: Sequence[int] = [math.ceil(1 / (factor - 1)) + 2 if axis == own else 1 for own in range(ndim)]
        value = at.call(_aten.cat.default, [value, at.call(_aten.repeat.default, last, times)], axis)
    return value
