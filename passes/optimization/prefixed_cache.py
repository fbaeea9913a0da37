"""Compute a cache without the prefix that stands before it from its parts, instead of cutting the prefix off again."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.matching import pair, slices_to_end

aten = torch.ops.aten
_LENGTH = 2  #: the axis of tokens of keys and values, [batch, heads, tokens, width]
_AXES = (-2, _LENGTH)


def split_prefix(rewriter: Rewriter, whole: fx.Node) -> bool:
    """Rewrite `whole = cat(cat(prefix, past), new)` and `whole[:, :, len(prefix):]` to two concatenations.

    They are `cat(prefix, past, new)` and `cat(past, new)`. So each call copies a past twice, not three times. Return
    whether it was done.
    """
    outer = pair(whole, _AXES)
    inner = None if outer is None else pair(outer[0], _AXES)
    if outer is None or inner is None:
        return False
    prefix, past = inner
    kept = [user for user in whole.users if _cuts(user, prefix)]
    if not kept:
        return False
    present = rewriter.after(whole).call(aten.cat.default, [past, outer[1]], _LENGTH, value=kept[0].meta["val"])
    for node in kept:
        rewriter.replace(node, present)
    value = whole.meta["val"]
    rewriter.update(whole, aten.cat.default, [prefix, past, outer[1]], _LENGTH)
    rewriter.revalue(whole, value)  # a sum of the same sizes, which other values name in this order
    return True


def _cuts(node: fx.Node, prefix: fx.Node) -> bool:
    """Say whether a node is its operand without the prefix's tokens."""
    if not slices_to_end(node) or len(node.args) < 3 or node.args[1] not in _AXES:
        return False
    start = node.args[2]
    size = start.meta["val"] if isinstance(start, fx.Node) else start
    return str(size) == str(prefix.meta["val"].shape[_LENGTH])
