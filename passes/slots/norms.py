"""norm_rows: a tensor of a norm that is another for each row of a batch, in the place of the base's.

An operator for a whole norm takes one weight for all rows: it is left without, and what it gives is scaled and shifted
behind it. Where a norm is written out, what reads the tensor reads the rows' own, however it is cast or shifted first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from peftfx.analysis.dataflow import ELEMENTWISE, names, op_name
from peftfx.errors import PeftfxError
from peftfx.passes.slots.weight import add_node

aten = torch.ops.aten
_UNSQUEEZE = aten.unsqueeze.default
#: Norms over the last axes, and over others: their weights run along the second.
_LAST, _SECOND = names("layer_norm rms_norm"), names("group_norm batch_norm instance_norm")

Row = Callable[[fx.Node, int], fx.Node]
"""The node of each row's tensor, for a value that it meets, with so many axes."""


def replace_by_row(tensor: fx.Node, row: Row, where: str) -> None:
    """Let what reads a norm's tensor read one for each row, in place.

    Raises:
        PeftfxError: it is given another shape before it meets what is normed.
    """
    _follow(tensor, (), row, where)


def _follow(node: fx.Node, through: Sequence[fx.Node], row: Row, where: str) -> None:
    for user in list(node.users):
        if op_name(user) in _LAST | _SECOND:
            _apart(user, node, through, row)
        elif len(user.all_input_nodes) > 1:
            axes = user.meta["val"].ndim - sum(step.target is _UNSQUEEZE for step in through)
            user.replace_input_with(node, _through(user, row(user, axes), through))
        elif op_name(user) in ELEMENTWISE or user.target is _UNSQUEEZE:
            _follow(user, (*through, user), row, where)
        elif user.meta["val"].shape == node.meta["val"].shape:  # all of it: `weight[:]`
            _follow(user, through, row, where)
        else:
            what = "this norm's tensor is given another shape by the model's code: rows cannot have their own"
            raise PeftfxError(what, where, "export the adapter merged, or swappable")


def _apart(norm: fx.Node, tensor: fx.Node, through: Sequence[fx.Node], row: Row) -> None:
    """Take a tensor out of a norm's arguments, and do behind it what it did, for each row."""
    places = {a.name: i for i, a in enumerate(norm.target._schema.arguments)}  # type: ignore[union-attr]
    given = {name: norm.args[i] if i < len(norm.args) else norm.kwargs.get(name) for name, i in places.items()}
    along = 0 if op_name(norm) in _LAST else norm.meta["val"].ndim - 2
    users, after, total = list(norm.users), norm.next, norm
    own = _through(after, row(norm, norm.meta["val"].ndim - along), through)
    if given["weight"] is tensor:
        total = add_node(after, norm, aten.mul.Tensor, total, _spread(after, own, along))
        added = given.get("bias")
    else:
        added = own
    if isinstance(added, fx.Node):
        total = add_node(after, norm, aten.add.Tensor, total, _spread(after, added, along))
    for name in ("weight", "bias") if given["weight"] is tensor else ("bias",):
        if name in norm.kwargs:
            norm.update_kwarg(name, None)
        elif places.get(name, len(norm.args)) < len(norm.args):
            norm.update_arg(places[name], None)
    for user in users:
        user.replace_input_with(norm, total)


def _spread(before: fx.Node, vector: fx.Node, axes: int) -> fx.Node:
    for _ in range(axes):
        vector = add_node(before, before, _UNSQUEEZE, vector, -1)
    return vector


def _through(before: fx.Node, value: fx.Node, through: Sequence[fx.Node]) -> fx.Node:
    """What becomes of a value on the way of another."""
    for step in through:
        if step.target is _UNSQUEEZE:  # counted from the end: there is an axis of rows ahead
            dim = int(str(step.args[1]))
            value = add_node(before, step, _UNSQUEEZE, value, dim - step.meta["val"].ndim if dim >= 0 else dim)
            continue
        with before.graph.inserting_before(before):
            value = before.graph.node_copy(step, _always(value))
        arguments, options = fx.node.map_arg((value.args, value.kwargs), lambda n: n.meta["val"])
        value.meta["val"] = step.target(*arguments, **options)  # type: ignore[operator]
    return value


def _always(value: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda _: value
