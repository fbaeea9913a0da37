"""Rewrite attention to [batch, length, heads * width], the layout of projections, without transposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.onnx.ops  # registers torch.ops.onnx
from torch import fx

from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.matching import COPIES, RESHAPES, has_axes, have_one_shape, operand, same_size

aten, onnx = torch.ops.aten, torch.ops.onnx
_Size = int | fx.Node


def flatten_heads(rewriter: Rewriter, attention: fx.Node, sizes: Mapping[str, fx.Node]) -> None:
    """Give an attention, and rotary embeddings right before it, inputs with the heads side by side.

    This is done only if query, key and value are transposed to [batch, heads, length, width], and the output is
    transposed back. The operator takes all values in one layout, and transposes them itself.

    Args:
        rewriter: the rewriter of the graph.
        attention: an `Attention` node over four axes.
        sizes: the nodes of the inputs' sizes: see `input_sizes`.
    """
    inputs = [_Input.of(x, sizes) for x in attention.args[:3]]  # type: ignore[arg-type]
    (output,) = (user for user in attention.users if user.args[1] == 0)
    turns = _turns(output)
    given = [x for x in inputs if x is not None]
    if len(given) != 3 or not turns:
        return
    query, key, value = given
    if query.width != value.width:  # for other sizes, torch gives such an output the queries' width
        return
    flat = [x.flatten(rewriter, attention) for x in given]
    heads = {"q_num_heads": query.heads, "kv_num_heads": key.heads}
    at = rewriter.before(attention)
    call = at.call(onnx.Attention.opset23, *flat, *attention.args[3:], **attention.kwargs, **heads)
    made = call.meta["val"]
    rewriter.revalue(call, (made[0], *attention.meta["val"][1:3], made[3]))
    rewriter.replace(attention, call)
    rewriter.erase(attention)
    rewriter.revalue(output, made[0])
    for turn in turns:
        _view(rewriter, output, turn, [*query.leading, query.heads, query.width])


@dataclass(frozen=True)
class _Input:
    """A value of [batch, heads, length, width] that was [batch, length, heads, width] before a transpose.

    Attributes:
        rows: the value before the transpose.
        rotary: the rotary embedding applied after the transpose, or None.
        leading: the sizes of batch and length.
        heads, width: the number of heads, and the width of each head.
    """

    rows: fx.Node
    rotary: fx.Node | None
    leading: tuple[_Size, _Size]
    heads: int
    width: int

    @staticmethod
    def of(node: fx.Node, sizes: Mapping[str, fx.Node]) -> _Input | None:
        rotary = node if node.target is onnx.RotaryEmbedding.opset23 and not node.kwargs else None
        rows = _unturned(operand(node) if rotary is not None else node)
        if rows is None:
            return None
        batch, length, heads, width = rows.meta["val"].shape
        leading = tuple(size if isinstance(size, int) else sizes.get(str(size)) for size in (batch, length))
        if None in leading or not isinstance(heads, int) or not isinstance(width, int):
            return None
        return _Input(rows, rotary, leading, heads, width)  # type: ignore[arg-type]

    def flatten(self, rewriter: Rewriter, attention: fx.Node) -> fx.Node:
        """Return the value as [batch, length, heads * width]."""
        plain = _flat(self.rows)
        if plain is None:
            shape = [*self.leading, self.heads * self.width]
            plain = rewriter.before(attention, self.rows).call(aten.reshape.default, self.rows, shape)
        if self.rotary is None:
            return plain
        at = rewriter.before(attention, self.rotary)
        return at.call(onnx.RotaryEmbedding.opset23, plain, *self.rotary.args[1:], num_heads=self.heads)


def input_sizes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the nodes of the sizes of a graph's inputs, by their symbols."""
    nodes = graph.find_nodes(op="call_function", target=aten.sym_size.int)
    return {str(node.meta["val"]): node for node in nodes if operand(node).op == "placeholder"}


def _unturned(node: fx.Node) -> fx.Node | None:
    """Return the x of `x.transpose(1, 2)` with four axes, or None."""
    while _is_same(node):
        node = operand(node)
    turned = node.target is aten.transpose.int and set(node.args[1:]) == {1, 2}
    turned = turned or (node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1, 3])  # type: ignore[arg-type]
    return operand(node) if turned and has_axes(node, ndim=4) else None


def _is_same(node: fx.Node) -> bool:
    """Say whether a node of four axes has its operand's values in the same places, even in other memory."""
    if node.target in COPIES:
        return has_axes(node, ndim=4)
    return node.target in RESHAPES and has_axes(node, ndim=4) and have_one_shape(node, operand(node))


def _flat(rows: fx.Node) -> fx.Node | None:
    """Return the [batch, length, heads * width] whose last axis was cut into heads, or None."""
    plain = operand(rows)
    if rows.target not in RESHAPES or not has_axes(plain, ndim=3):
        return None
    width = rows.meta["val"].shape[2] * rows.meta["val"].shape[3]
    leading = all(same_size(rows, axis, plain, axis) for axis in (0, 1))
    return plain if leading and plain.meta["val"].shape[2] == width else None


def _turns(output: fx.Node) -> list[fx.Node]:
    """Return the transposes of an attention's output. The list is empty if another operator reads the output."""
    found: list[fx.Node] = []
    for user in output.users:
        turns = _turns(user) if _is_same(user) else [user] if _unturned(user) is not None else []
        if not turns:
            return []
        found += turns
    return found


def _view(rewriter: Rewriter, flat: fx.Node, turn: fx.Node, shape: Sequence[object]) -> None:
    """Replace a transpose of the old output by the new output, cut into heads for users that read heads."""
    view = rewriter.before(turn).call(aten.reshape.default, flat, list(shape))
    rewriter.replace(turn, view)
    for user in list(view.users):
        for rows in list(user.users) if user.target in COPIES else [user]:
            if rows.target in RESHAPES and have_one_shape(rows, flat):
                rewriter.replace(rows, flat)
