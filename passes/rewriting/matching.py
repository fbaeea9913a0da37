"""Helpers for matching patterns in graphs: operands in either order, equal sizes, replacement of nodes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from peftfx.graph.rewriter import Rewriter

aten = torch.ops.aten
COPIES = {aten.clone.default, aten.contiguous.default}
RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
_WHOLE = (None, 2**63 - 1, 1)  # the start, end and step of a slice that takes everything
ADDS, MULS = {aten.add.Tensor, aten.add.Scalar}, {aten.mul.Tensor, aten.mul.Scalar}


def replace(rewriter: Rewriter, node: fx.Node, target: Callable[..., object], *args: object) -> None:
    """Replace a node by an operator whose result has the same dtype and sizes."""
    rewriter.replace(node, rewriter.before(node).call(target, *args, value=node.meta["val"]))


def in_dtype_of(rewriter: Rewriter, node: fx.Node, value: fx.Node) -> fx.Node:
    """Return a value in the dtype of `node`, for an operator of ONNX that takes one dtype; it is cast before `node`."""
    dtype = node.meta["val"].dtype
    if value.meta["val"].dtype == dtype:
        return value
    return rewriter.before(node).call(torch.ops.aten._to_copy.default, value, dtype=dtype)


def operand(node: fx.Node) -> fx.Node:
    """Return a node's first operand, or the node itself if it has none."""
    first = node.args[0] if node.args else node
    return first if isinstance(first, fx.Node) else node


def peel(node: fx.Node, target: object) -> fx.Node:
    """Return the operand of a node with this operator. Any other node is returned unchanged."""
    return operand(node) if node.target is target else node


def either_way(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Return both orders of the operands of a sum or product of two values."""
    first, second, *_ = (*node.args, None, None)
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


def has_axes(node: fx.Node, ndim: int) -> bool:
    """Say whether a node is a tensor with `ndim` axes."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim == ndim


def same_size(one: fx.Node, axis: int, other: fx.Node, other_axis: int) -> bool:
    """Say whether two sizes are the same number or the same symbol. Nothing is assumed about symbols."""
    a, b = one.meta["val"].shape[axis], other.meta["val"].shape[other_axis]
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def have_one_shape(one: fx.Node, other: fx.Node) -> bool:
    """Say whether two tensors have the same sizes on all axes."""
    a, b = (node.meta.get("val") for node in (one, other))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.ndim == b.ndim and all(same_size(one, axis, other, axis) for axis in range(a.ndim))


def pair(node: fx.Node, axes: tuple[int, int]) -> tuple[fx.Node, fx.Node] | None:
    """Return the two values that a node concatenates along one of `axes` (names of the same axis), or None."""
    if node.target is not aten.cat.default or node.args[1:] not in tuple((axis,) for axis in axes):
        return None
    values = node.args[0]
    return tuple(values) if isinstance(values, (list, tuple)) and len(values) == 2 else None


def slices_to_end(node: fx.Node) -> bool:
    """Say whether a node is a slice that takes all entries from some entry on."""
    end_and_step = (*node.args[3:], *_WHOLE[max(1, len(node.args) - 2) :])
    return node.target is aten.slice.Tensor and not node.kwargs and end_and_step in ((None, 1), (2**63 - 1, 1))


def takes_all(node: fx.Node) -> bool:
    """Say whether a node is a slice that takes everything."""
    return slices_to_end(node) and node.args[2:3] in ((), (None,), (0,))


def unsliced(node: fx.Node) -> fx.Node:
    """Return a value without slices that take everything."""
    while takes_all(node):
        node = operand(node)
    return node


def unrepeated(node: fx.Node) -> fx.Node:
    """Return the keys or values before `repeat_kv` repeated them for each head of a group. Others are unchanged."""
    if node.target not in RESHAPES or operand(node).target is not aten.expand.default:
        return node
    expand = operand(node)
    single = unsliced(operand(expand))
    if single.target is not aten.unsqueeze.default or single.args[1] != 2 or not has_axes(expand, ndim=5):
        return node
    plain, (_, heads, times, _, _) = unsliced(operand(single)), expand.meta["val"].shape
    rest = all(same_size(node, axis, plain, axis) for axis in (0, 2, 3))
    return plain if rest and has_axes(node, ndim=4) and node.meta["val"].shape[1] == heads * times else node
