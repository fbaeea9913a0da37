"""update_call: scales and a low-rank sum at one call of a layer, given as nodes of the graph.

`op(x, W, b)` becomes `op(x * inner, W) * outer + low + b`, with `low` the sum: `(x A) B` at a linear layer, and at
another the layer's own operation with `A` in the place of `W`, and behind it a product with `B`. That is `op` itself
where the scales are 1 and the factors nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftfx.passes.rewriting.site_op import bias_of, filled, operands, strip_bias
from peftfx.sites.site import Call, Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Acting:
    """The nodes that act at a call; what is None does nothing.

    Each broadcasts against what the layer reads or gives: one for the whole call, or one for each of its rows.

    Attributes:
        inner, outer: scales of the layer's input, and of its output without the bias.
        low: the low-rank sum.
        bias: in the place of the layer's own.
    """

    inner: fx.Node | None = None
    outer: fx.Node | None = None
    low: fx.Node | None = None
    bias: fx.Node | None = None


def update_call(nodes: dict[str, fx.Node], site: Site, call: Call, acting: Acting) -> None:
    """Let these act at one call of a site, in place; `nodes` has the result by the name of what it replaces."""
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
    if acting.low is not None:
        total = add_node(after, op, aten.add.Tensor, total, acting.low)
    if acting.bias is not None:
        bias = acting.bias
    elif bias is not None:
        bias = along_channels(after, bias, site)
    if apart:
        y.update_arg(1, bias)
    elif bias is not None:
        total = add_node(after, op, aten.add.Tensor, total, bias)
    for user in users:
        user.replace_input_with(value, total)
    nodes[value.name] = total  # a later layer may read it as its own input


def has_one_dtype(site: Site, nodes: dict[str, fx.Node]) -> bool:
    """Whether a site's values have the dtype of its weight. A layer that casts has several, and a slot has one."""
    if site.kind == "embedding":
        return True
    values = [nodes[name] for call in site.calls for name in (call.x, call.op, call.y)]
    values += [operands(site, call, nodes)[0] for call in site.calls]
    return len({value.meta["val"].dtype for value in values}) == 1


def low_rank(site: Site, op: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """The low-rank sum at one call, of factors of one shape for all of it: those that a slot holds."""
    if site.kind == "conv":
        plain = _overload(op).overloadpacket.default
        return add_node(op, op, plain, conv_low(op, x, a), b)
    if site.kind == "embedding":
        return times(op, add_node(op, op, aten.embedding.default, a, x), b)
    return product(op, x, a, b)


def product(op: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """`(x A) B`."""
    return times(op, times(op, x, a), b)


def times(op: fx.Node, x: fx.Node, factor: fx.Node) -> fx.Node:
    """A product; a row of features that has a factor of its own is a matrix of one row."""
    alone = x.meta["val"].ndim < factor.meta["val"].ndim
    x = add_node(op, op, aten.unsqueeze.default, x, -2) if alone else x
    made = add_node(op, op, aten.matmul.default, x, factor)
    return add_node(op, op, aten.squeeze.dim, made, -2) if alone else made


def conv_low(op: fx.Node, x: fx.Node, a: fx.Node) -> fx.Node:
    """A conv's operation with another weight, in one group and without a bias."""
    with op.graph.inserting_before(op):
        made = op.graph.call_function(_overload(op), (x, a, None, *filled(op)[3:6], 1))
    value, axis = op.meta["val"], 1 - a.meta["val"].ndim
    sizes = [*value.shape[:axis], a.meta["val"].shape[0], *value.shape[axis + 1 :]]
    made.meta = {"val": value.new_empty(sizes), "nn_module_stack": op.meta.get("nn_module_stack")}
    return made


def along_channels(before: fx.Node, vector: fx.Node, site: Site) -> fx.Node:
    """A vector of a site's inputs or outputs, for a conv with an axis for each of its space."""
    for _ in range(len(site.shape) - 2 if site.kind == "conv" else 0):
        vector = add_node(before, before, aten.unsqueeze.default, vector, -1)
    return vector


def _overload(op: fx.Node) -> torch._ops.OpOverload:
    assert isinstance(op.target, torch._ops.OpOverload)
    return op.target


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
