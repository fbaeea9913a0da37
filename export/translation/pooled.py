"""Pools: adaptive ones over axes whose size is free or of largest values, and averages with a divisor of their own.

torch's decomposition of adaptive pools asks how the sizes divide, and is right for the example's answer alone. Here
each window is read whole: place `i` of `n` pools the values from `floor(i L / n)` up to `ceil((i + 1) L / n)`. torch's
exporter drops the divisor of an average.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftfx.analysis.dataflow import arguments_of
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
_MEANS = {
    *(_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default, _aten.adaptive_avg_pool3d.default),
    *(_aten._adaptive_avg_pool2d.default, _aten._adaptive_avg_pool3d.default),
}
_LARGEST = {_aten.adaptive_max_pool1d.default, _aten.adaptive_max_pool2d.default, _aten.adaptive_max_pool3d.default}
_AVERAGES = {_aten.avg_pool2d.default: 2, _aten.avg_pool3d.default: 3}  #: and the number of their axes
_HALVES = (torch.float16, torch.bfloat16)


def pool_any_size(rewriter: Rewriter, node: fx.Node) -> bool:
    """Replace an adaptive pool over an axis whose size is free, or of largest values. Return whether the node was one.

    A pool whose largest values' places are used is left to torch.
    """
    if node.target not in _MEANS | _LARGEST:
        return False
    value, sizes = node.args
    assert isinstance(value, fx.Node)
    assert isinstance(sizes, (list, tuple))
    first = value.meta["val"].ndim - len(sizes)
    results = [user for user in node.users if user.target is operator.getitem] if node.target in _LARGEST else [node]
    places = [user for user in results if node.target in _LARGEST and user.args[1] == 1 and user.users]
    fixed = all(isinstance(size, int) for size in value.meta["val"].shape[first:])
    if places or (fixed and node.target in _MEANS):  # of a largest value, torch has no decomposition
        return False
    at = rewriter.before(node)
    for axis, size in enumerate(sizes, start=first):
        given = [size] if isinstance(size, fx.Node) else []
        want = size.meta["val"] if isinstance(size, fx.Node) else size
        if not statically_known_true(want == value.meta["val"].shape[axis]):
            how = (axis, None if given else size, node.target in _LARGEST)
            key = ("adaptive pool", *how)
            value = at.trace(functools.partial(_pooled, how), value, *given, key=key, what="an adaptive pool")
    for result in results:
        rewriter.replace(result, value)
    return True


def divide_sums(rewriter: Rewriter, node: fx.Node) -> bool:
    """Write an average pool with a divisor as a mean of whole windows. Return whether the node was one.

    A pool that rounds its sizes up is left to torch: its last windows are not whole.
    """
    if node.target not in _AVERAGES:
        return False
    x, kernel, stride, padding, rounds_up, _, divisor = arguments_of(node).values()
    if divisor is None or rounds_up:
        return False
    values = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** _AVERAGES[node.target]
    rewriter.update(node, node.target, x, kernel, stride, padding, False, True)
    rewriter.extend(node, rewriter.after(node).call(_aten.mul.Tensor, node, values / divisor))
    return True


def _pooled(how: tuple[int, int | None, bool], x: Tensor, size: int = 1) -> Tensor:
    """Pool one axis of a tensor.

    Args:
        how: the axis, its size in the result or None for `size`, and whether a window gives its largest value.
        x: the tensor.
        size: a size that a node computes.
    """
    axis, fixed, largest = how
    size = size if fixed is None else fixed
    length, behind = x.shape[axis], [1] * (x.ndim - axis - 1)
    if fixed == 1:  # a size that a node computes may be 1 in one call, and not in another
        return x.amax(axis, keepdim=True) if largest else x.mean(axis, keepdim=True)
    parts = size if fixed is not None else torch.sym_max(size, 1)  # of no place, ONNX Runtime divides by zero
    place = torch.arange(size, device=x.device)
    start = (place * length).div(parts, rounding_mode="floor")
    end = ((place + 1) * length + parts - 1).div(parts, rounding_mode="floor")
    window = length // parts + 2
    at = start[:, None] + torch.arange(window, device=x.device)
    inside = (at < end[:, None]).reshape(size, window, *behind)
    rows = x.index_select(axis, at.clamp(max=length - 1).flatten())
    rows = rows.reshape(*x.shape[:axis], size, window, *x.shape[axis + 1 :])
    if largest:
        return rows.masked_fill(~inside, -torch.inf).amax(axis + 1)
    half = x.dtype in _HALVES  # their sums are rounded at the end alone, as in torch
    total = rows.masked_fill(~inside, 0).sum(axis + 1, dtype=torch.float32 if half else None)
    mean = total / (end - start).reshape(size, *behind)
    return _aten._to_copy.default(mean, dtype=x.dtype) if half else mean
