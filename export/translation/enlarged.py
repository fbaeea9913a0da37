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

import torch
from torch import fx

from peftfx.graph.rewriter import Cursor, Rewriter

_aten = torch.ops.aten
_BY_AXES = {
    *(_aten.upsample_nearest2d.vec, _aten.upsample_nearest3d.vec, _aten._upsample_nearest_exact2d.vec),
    *(_aten.upsample_bilinear2d.vec, _aten.upsample_trilinear3d.vec),
}
_SPLINES = {_aten.upsample_bicubic2d.vec}


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
        result = at.call(node.target, _lengthened(at, value, grown), *options, factors)
        for axis in grown:
            result = at.call(_aten.slice.Tensor, result, axis, 0, at.call(_aten.sym_size.int, node, axis))
    else:
        result = value
        for axes in ([axis for axis in range(first, first + len(factors)) if axis not in grown], *([a] for a in grown)):
            if axes:
                own = [f if first + i in axes else 1.0 for i, f in enumerate(factors)]
                result = at.call(node.target, result, *options, own)
    rewriter.replace(node, result, users)
    return True


def _lengthened(at: Cursor, value: fx.Node, grown: Mapping[int, float]) -> fx.Node:
    """Return a tensor with so many copies of the last values of each axis that it grows, whatever its size."""
    ndim = value.meta["val"].ndim
    for axis, factor in grown.items():
        last = at.call(_aten.slice.Tensor, value, axis, -1, sys.maxsize)
        times: Sequence[int] = [math.ceil(1 / (factor - 1)) + 2 if axis == own else 1 for own in range(ndim)]
        value = at.call(_aten.cat.default, [value, at.call(_aten.repeat.default, last, times)], axis)
    return value
