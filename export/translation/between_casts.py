"""Compute in float32, between casts, what the code of a float32 or float16 model computes in bfloat16.

ONNX Runtime's CPU provider has no bfloat16 kernels for most operators, but it casts. torch, too, computes one operation
in bfloat16 with float32's arithmetic and rounds the result.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from peftfx.graph.rewriter import Cursor, Rewriter
from peftfx.passes.optimization.cleanup import CASTS

_NARROW, _WIDE = torch.bfloat16, torch.float32
_cast = torch.ops.aten._to_copy.default


def put_between_casts(rewriter: Rewriter) -> None:
    """Rewrite each operation on bfloat16 values, or that makes some, in place. Operations with side effects stay."""
    for node in list(rewriter.graph.nodes):
        target = node.target
        if not isinstance(target, OpOverload) or target in CASTS or target._schema.is_mutable:
            continue
        if not (_is_narrow(node) or any(map(_is_narrow, node.all_input_nodes))):
            continue
        at = rewriter.before(node)
        made = at.call(target, *_widened(node.args, at), **_widened(node.kwargs, at))
        rewriter.replace(node, _rounded(made, node, at))
        rewriter.erase(node)
        _round_parts(rewriter, made)


def _is_narrow(node: fx.Node) -> bool:
    """Say whether a value is in bfloat16, or one of several is."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(one, torch.Tensor) and one.dtype == _NARROW for one in values)


def _widened(arguments: Any, at: Cursor) -> Any:
    """Return arguments with casts of what is in bfloat16, and float32 in the place of the dtype itself."""

    def widen(one: Any) -> Any:
        if isinstance(one, fx.Node):
            return at.call(_cast, one, dtype=_WIDE) if _is_narrow(one) else one
        return _WIDE if one is _NARROW else one

    return fx.node.map_aggregate(arguments, widen)


def _rounded(made: fx.Node, old: fx.Node, at: Cursor) -> fx.Node:
    """Return a value in the dtype of the old one. One of several values is rounded where it is taken out."""
    value = old.meta["val"]
    if not isinstance(value, torch.Tensor) or made.meta["val"].dtype == value.dtype:
        return made
    return at.call(_cast, made, dtype=value.dtype)


def _round_parts(rewriter: Rewriter, made: fx.Node) -> None:
    for part in [user for user in made.users if user.target is operator.getitem]:
        if _is_narrow(part):
            rewriter.revalue(part, made.meta["val"][part.args[1]])
            rewriter.extend(part, rewriter.after(part).call(_cast, part, dtype=_NARROW))
