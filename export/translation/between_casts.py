"""Compute in float32, between casts, what the code of a float32 or float16 model computes in bfloat16.

ONNX Runtime's CPU provider has no bfloat16 kernels for most operators, but it casts. torch, too, computes one operation
in bfloat16 with float32's arithmetic and rounds the result.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from peftfx.analysis.dataflow import names, op_name
from peftfx.graph.rewriter import Cursor, Rewriter
from peftfx.passes.optimization.cleanup import CASTS

_NARROW, _WIDE = torch.bfloat16, torch.float32
HALVES = (_NARROW, torch.float16)
#: Operations for which torch rounds a number in the code to the dtype of their result. It multiplies and divides by the
#: number itself.
ROUNDED = names("add sub rsub remainder fmod pow eq ne lt le gt ge")
_cast = torch.ops.aten._to_copy.default
_SCALED = names("mul div")
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_REINTERPRETS = torch.ops.aten.view.dtype  #: reads the same bits as numbers of another dtype


def put_between_casts(rewriter: Rewriter) -> None:
    """Rewrite each operation on bfloat16 values, or that makes some, in place. Operations with side effects stay."""
    for node in list(rewriter.graph.nodes):
        target = node.target
        if not isinstance(target, OpOverload) or target in (*CASTS, _REINTERPRETS) or target._schema.is_mutable:
            continue
        if not (_is_narrow(node) or any(map(_is_narrow, node.all_input_nodes))):
            continue
        at, rounds, value = rewriter.before(node), op_name(node) in ROUNDED, node.meta["val"]
        node.args, node.kwargs = (_widened(given, at, rounds=rounds) for given in (node.args, node.kwargs))
        rewriter.revalue(node, _wide(value))
        if isinstance(value, torch.Tensor) and value.dtype == _NARROW:
            rewriter.extend(node, rewriter.after(node).call(_cast, node, dtype=_NARROW))
        _round_parts(rewriter, node)


def scale_exactly(rewriter: Rewriter, node: fx.Node) -> None:
    """Multiply or divide a value in half precision by a number that half precision lacks, in float32 between casts.

    torch computes with the number itself, as with `1 / sqrt(width)` of heads. In ONNX it would be rounded: each result
    would be off by the same factor.
    """
    value, (x, number, *_) = node.meta.get("val"), (*node.args, None, None)
    if op_name(node) not in _SCALED or not isinstance(number, float) or not isinstance(value, torch.Tensor):
        return
    if (
        value.dtype not in HALVES
        or not isinstance(x, fx.Node)
        or torch.tensor(number, dtype=value.dtype).item() == number
    ):
        return
    node.replace_input_with(x, rewriter.before(node).call(_cast, x, dtype=_WIDE))
    rewriter.revalue(node, value.to(_WIDE))
    rewriter.extend(node, rewriter.after(node).call(_cast, node, dtype=value.dtype))


def scale_queries(rewriter: Rewriter) -> None:
    """Scale the queries of attentions in half precision ahead, exactly, where the attention has no operator of its own.

    Its translation multiplies queries and keys by the square root of the scale, which half precision rounds.
    """
    for node in [node for node in rewriter.graph.nodes if node.target is _SDPA]:
        query, value = node.args[0], node.meta["val"]
        given = node.kwargs.get("scale")
        width = query.meta["val"].shape[-1]
        scale = given if given is not None else width**-0.5 if isinstance(width, int) else None
        if value.dtype in HALVES and isinstance(scale, float):
            scaled = rewriter.before(node).call(torch.ops.aten.mul.Tensor, query, scale)
            node.args, node.kwargs = (scaled, *node.args[1:]), {**node.kwargs, "scale": 1.0}
            scale_exactly(rewriter, scaled)


def is_narrow(base: nn.Module) -> bool:
    """Say whether a model is in bfloat16: most of its numbers are. It is then computed so, on another provider."""
    sizes = [(p.numel(), p.dtype == _NARROW) for p in base.parameters() if p.is_floating_point()]
    return 2 * sum(size for size, narrow in sizes if narrow) > sum(size for size, _ in sizes)


def _is_narrow(node: fx.Node) -> bool:
    """Say whether a value is in bfloat16, or one of several is."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(one, torch.Tensor) and one.dtype == _NARROW for one in values)


def _wide(value: Any) -> Any:
    """Return a value, or several, with float32 in the place of bfloat16."""
    if isinstance(value, list | tuple):
        return type(value)(map(_wide, value))
    return value.to(_WIDE) if isinstance(value, torch.Tensor) and value.dtype == _NARROW else value


def _widened(arguments: Any, at: Cursor, *, rounds: bool) -> Any:
    """Return arguments with casts of what is in bfloat16, and float32 in the place of the dtype itself.

    Args:
        arguments: the arguments of an operation.
        at: where the casts are made.
        rounds: whether numbers are rounded to bfloat16.
    """

    def widen(one: Any) -> Any:
        if isinstance(one, fx.Node):
            return at.call(_cast, one, dtype=_WIDE) if _is_narrow(one) else one
        if rounds and isinstance(one, float):
            return torch.tensor(one, dtype=_NARROW).item()
        return _WIDE if one is _NARROW else one

    return fx.node.map_aggregate(arguments, widen)


def _round_parts(rewriter: Rewriter, made: fx.Node) -> None:
    for part in [user for user in made.users if user.target is operator.getitem]:
        if _is_narrow(part):
            rewriter.revalue(part, made.meta["val"][part.args[1]])
            rewriter.extend(part, rewriter.after(part).call(_cast, part, dtype=_NARROW))
