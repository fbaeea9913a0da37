"""Replace a norm's tensor by a tensor for each row of a batch.

The operator of a whole norm takes one weight for all rows. So it gets no weight, and its output is scaled and shifted
afterwards. If the model's code spells out the norm, the readers of the tensor read the rows' tensors instead, with the
same casts and shifts before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from peftfx.analysis.dataflow import ELEMENTWISE, names, op_name
from peftfx.errors import PeftfxError
from peftfx.graph.rewriter import Cursor, Rewriter

aten = torch.ops.aten
_UNSQUEEZE = aten.unsqueeze.default
#: Norms over the last axes, and norms over other axes, whose weights run along the second axis.
_LAST, _SECOND = names("layer_norm rms_norm"), names("group_norm batch_norm instance_norm")

_Row = Callable[[fx.Node, int], fx.Node]
"""A function that returns the node of each row's tensor, with this number of axes, for a value that is normed."""


def replace_by_row(rewriter: Rewriter, tensor: fx.Node, row: _Row, where: str) -> None:
    """Let the readers of a norm's tensor read a tensor for each row, in place.

    Raises:
        PeftfxError: the model's code reshapes the tensor before combining it with the normed value.
    """
    _follow(rewriter, tensor, (), row, where)


def _follow(rewriter: Rewriter, node: fx.Node, through: Sequence[fx.Node], row: _Row, where: str) -> None:
    for user in list(node.users):
        if op_name(user) in _LAST | _SECOND:
            _apart(rewriter, user, node, through, row)
        elif len(user.all_input_nodes) > 1:
            axes = user.meta["val"].ndim - sum(step.target is _UNSQUEEZE for step in through)
            user.replace_input_with(node, _through(rewriter.before(user), row(_normed(user, node), axes), through))
        elif op_name(user) in ELEMENTWISE or user.target is _UNSQUEEZE:
            _follow(rewriter, user, (*through, user), row, where)
        elif user.meta["val"].shape == node.meta["val"].shape:  # the whole tensor: `weight[:]`
            _follow(rewriter, user, through, row, where)
        else:
            what = "this norm's tensor is given another shape by the model's code: rows cannot have their own"
            raise PeftfxError(what, where, "export the adapter merged, or swappable")


def _apart(rewriter: Rewriter, norm: fx.Node, tensor: fx.Node, through: Sequence[fx.Node], row: _Row) -> None:
    """Remove a tensor from a norm's arguments, and apply each row's tensor after the norm."""
    names = [a.name for a in norm.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, norm.args, strict=False)) | norm.kwargs
    along = 0 if op_name(norm) in _LAST else norm.meta["val"].ndim - 2
    scales = given["weight"] is tensor
    gone = ("weight", "bias") if scales else ("bias",)
    left = {name: None if name in gone else value for name, value in given.items()}
    nodes = [value for value in left.values() if isinstance(value, fx.Node)]
    added = [given["bias"]] if scales and isinstance(given.get("bias"), fx.Node) else []

    def apart(own: Tensor, *values: Tensor) -> Tensor:
        found = iter(values)
        arguments = {name: next(found) if isinstance(value, fx.Node) else value for name, value in left.items()}
        y = norm.target(**arguments)  # type: ignore[operator]
        y = y * spread(own, along) if scales else y + spread(own, along)
        return y + spread(next(found), along) if added else y

    users, at = list(norm.users), rewriter.after(norm)
    own = _through(at, row(norm.all_input_nodes[0], norm.meta["val"].ndim - along), through)
    fixed = {name: value for name, value in left.items() if not isinstance(value, fx.Node)}
    key = "norm", norm.target, fixed, scales, along
    total = at.trace(apart, own, *nodes, *added, key=key, where=str(tensor.target))
    rewriter.replace(norm, total, users)
    rewriter.erase(norm)


def _normed(user: fx.Node, tensor: fx.Node) -> fx.Node:
    """Return what a user combines a norm's tensor with: an operand with as many axes as the result has."""
    axes = user.meta["val"].ndim
    others = [n for n in user.all_input_nodes if n is not tensor and n.meta["val"].ndim == axes]
    return others[0] if others else user


def spread(vector: Tensor, axes: int) -> Tensor:
    """Add this number of axes to the end of a vector of channels."""
    for _ in range(axes):
        vector = vector.unsqueeze(-1)
    return vector


def _through(at: Cursor, value: fx.Node, through: Sequence[fx.Node]) -> fx.Node:
    """Apply the steps that another value went through to a value."""
    for step in through:
        if step.target is _UNSQUEEZE:  # counted from the end, because an axis of rows comes first
            dim = int(str(step.args[1]))
            value = at.call(_UNSQUEEZE, value, dim - step.meta["val"].ndim if dim >= 0 else dim)
        else:
            value = at.copy(step, {step.all_input_nodes[0]: value}, anew=True)
    return value
