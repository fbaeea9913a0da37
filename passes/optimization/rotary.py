"""Fuse rotary position embeddings that a model's code spells out into ONNX's own operator."""

from __future__ import annotations

import torch
import torch.onnx.ops  # registers torch.ops.onnx
from torch import fx

from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.matching import MULS, either_way, has_axes, in_dtype_of, operand, pair, replace, same_size

aten, onnx = torch.ops.aten, torch.ops.onnx
_END = 2**63 - 1


def fuse_rotary(rewriter: Rewriter, node: fx.Node, halves: dict[fx.Node, fx.Node]) -> bool:
    """Fuse `x * cos + rotate_half(x) * sin` for x of [batch, heads, length, width]. Return whether it was done."""
    if node.target is not aten.add.Tensor or node.kwargs or not has_axes(node, ndim=4):
        return False
    for straight, turned in either_way(node):
        if straight.target is not aten.mul.Tensor or turned.target is not aten.mul.Tensor:
            continue
        for half, sin in either_way(turned):
            x = _rotated(half)
            if x is None:
                continue
            for same, cos in either_way(straight):
                tables = [_table(angle, same) for angle in (cos, sin)]
                dtypes = {table.meta["val"].dtype for table in tables if table is not None}
                if same is x and None not in tables and dtypes == {node.meta["val"].dtype}:
                    own = in_dtype_of(rewriter, node, x)
                    first = [_half(rewriter, table, halves) for table in tables if table is not None]
                    replace(rewriter, node, onnx.RotaryEmbedding.opset23, own, *first)
                    return True
    return False


def _rotated(node: fx.Node) -> fx.Node | None:
    """Return the x of `cat(-x[..., width / 2:], x[..., :width / 2])`, or None."""
    parts = pair(node, (-1, 3))
    if parts is None or parts[0].target is not aten.neg.default:
        return None
    high, low = operand(parts[0]), parts[1]
    x, width = operand(low), node.meta["val"].shape[-1]
    cut = aten.slice.Tensor
    halves = (low.target, low.args) == (cut, (x, 3, 0, width // 2)) and high.target is cut
    return x if halves and high.args in ((x, 3, width // 2, _END), (x, 3, width // 2, width)) else None


def _table(angle: fx.Node, x: fx.Node) -> fx.Node | None:
    """Return a table of cosines or sines [batch, length, width] for x whose second half equals the first, or None."""
    if angle.target is not aten.unsqueeze.default or angle.args[1] != 1 or not has_axes(angle, ndim=4):
        return None
    table = operand(angle)
    if not (same_size(table, 0, x, 0) and same_size(table, 1, x, 2) and same_size(table, 2, x, 3)):
        return None
    *_, angles = _made_of(table)
    twice = pair(angles, (-1, 2))
    return table if twice is not None and twice[0] is twice[1] else None


def _made_of(table: fx.Node) -> list[fx.Node]:
    """Return a table, the elementwise steps back to its cosine or sine, and the angles."""
    steps = [table]
    while (table.target in MULS and not isinstance(table.args[1], fx.Node)) or table.target is aten._to_copy.default:
        table = operand(table)
        steps.append(table)
    return [*steps, operand(table)] if table.target in (aten.cos.default, aten.sin.default) else steps


def _half(rewriter: Rewriter, table: fx.Node, halves: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return the first half of a table's width, computed from half of the angles; shared by all layers."""
    if table not in halves:
        *steps, angles = _made_of(table)
        half = angles.args[0][0]  # type: ignore[index]
        for step in reversed(steps):
            half = rewriter.before(table, step).call(step.target, half, *step.args[1:], **step.kwargs)
        halves[table] = half  # type: ignore[assignment]
    return halves[table]
