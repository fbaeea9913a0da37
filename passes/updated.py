"""updated: scales and a low-rank sum at one call of a linear layer, given as nodes of the graph.

`op(x, W, b)` becomes `op(x * inner, W) * outer + (x A) B + b`, which is `op` itself where the scales are 1 and the rank
is 0. Each node broadcasts against what the layer reads or gives: one for the whole call, or one for each of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftfx.passes.site_op import bias_of, strip_bias
from peftfx.sites import Call

aten = torch.ops.aten


@dataclass(frozen=True)
class Acting:
    """The nodes that act at a call; what is None does nothing.

    Attributes:
        inner, outer: scales of the layer's input, and of its output without the bias.
        a, b: factors of the sum, [..., in, r] and [..., r, out].
        bias: in the place of the layer's own.
    """

    inner: fx.Node | None = None
    outer: fx.Node | None = None
    a: fx.Node | None = None
    b: fx.Node | None = None
    bias: fx.Node | None = None


def update_call(nodes: dict[str, fx.Node], call: Call, acting: Acting) -> None:
    """Let these act at one call of a linear site, in place."""
    op, x, y = nodes[call.op], nodes[call.x], nodes[call.y]
    apart = y is not op and bias_of(op, op) is None and bias_of(op, y) is not None  # it is added by a node of its own
    bias = bias_of(op, y) if apart else strip_bias(op)
    value = y.args[0] if apart else y
    assert isinstance(value, fx.Node)
    users, after = list(value.users), value.next
    if acting.inner is not None:
        _feed(op, x, add_node(op, op, aten.mul.Tensor, x, acting.inner))
    total = value
    if acting.outer is not None:
        total = add_node(after, op, aten.mul.Tensor, total, acting.outer)
    if acting.a is not None and acting.b is not None:
        total = add_node(after, op, aten.add.Tensor, total, _product(after, op, x, acting.a, acting.b))
    bias = bias if acting.bias is None else acting.bias
    if apart:
        y.update_arg(1, bias)
    elif bias is not None:
        total = add_node(after, op, aten.add.Tensor, total, bias)
    for user in users:
        user.replace_input_with(value, total)


def _product(after: fx.Node, op: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """`(x A) B`; a row of features that has factors of its own is a matrix of one row."""
    alone = x.meta["val"].ndim < a.meta["val"].ndim
    x = add_node(after, op, aten.unsqueeze.default, x, -2) if alone else x
    low = add_node(after, op, aten.matmul.default, x, a)
    added = add_node(after, op, aten.matmul.default, low, b)
    return add_node(after, op, aten.squeeze.dim, added, -2) if alone else added


def _feed(op: fx.Node, x: fx.Node, scaled: fx.Node) -> None:
    """Let an operation read another input, through the view that may be between."""
    operand = op.args[0]
    assert isinstance(operand, fx.Node)
    if operand is not x:
        with op.graph.inserting_before(op):
            scaled = op.graph.node_copy(operand, lambda n: scaled if n is x else n)
    op.update_arg(0, scaled)


def add_node(before: fx.Node, like: fx.Node, target: torch._ops.OpOverload, *args: fx.node.Argument) -> fx.Node:
    """A new node ahead of one, as code of the module that made another."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    made.meta = {"val": target(*values), "nn_module_stack": like.meta.get("nn_module_stack")}  # type: ignore[misc]
    return made
