"""read_apart: a layer that reads the tokens of all rows as one list is given them row by row: [batch, tokens, in]."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from peftfx.passes.slots.weight import add_node
from peftfx.sites.site import Call

aten = torch.ops.aten
_FLATTENS = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints})


def read_apart(nodes: dict[str, fx.Node], call: Call, batch: fx.Node) -> Call:
    """The call of a linear layer on rows apart, in place; the call as it is where its tokens are not such a list.

    Args:
        nodes: by name; what reads the layer's output then reads it as a list again.
        call: its `x` is [batch * tokens, in], flattened from [batch, tokens, ...] somewhere before it.
        batch: a node whose first axis is the batch's.
    """
    op, x = nodes[call.op], nodes[call.x]
    if not _lists_rows(x, batch) or op.args[0] is not x:
        return call
    rows = add_node(op, op, aten.sym_size.int, batch, 0)
    apart = add_node(op, op, aten.reshape.default, x, [rows, -1, x.meta["val"].shape[-1]])
    users, after, features = list(op.users), op.next, op.meta["val"].shape[-1]
    op.update_arg(0, apart)
    op.meta["val"] = op.meta["val"].new_empty((*apart.meta["val"].shape[:-1], features))
    listed = add_node(after, op, aten.reshape.default, op, [-1, features])
    for user in users:
        user.replace_input_with(op, listed)
    nodes[apart.name] = apart
    return dataclasses.replace(call, x=apart.name)


def _lists_rows(value: fx.Node, batch: fx.Node) -> bool:
    """Whether a list of tokens was flattened from a value whose first axis is the batch's."""
    length = str(value.meta["val"].shape[0])
    while value.target not in _FLATTENS:
        before = value.args[0] if value.args else None
        if not isinstance(before, fx.Node) or str(before.meta["val"].shape[:1]) != f"torch.Size([{length}])":
            return False
        value = before
    (source, *_) = value.all_input_nodes
    whole = source.meta["val"].shape
    return len(whole) > 2 and str(whole[0]) == str(batch.meta["val"].shape[0])
