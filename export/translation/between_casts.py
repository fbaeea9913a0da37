"""Compute in float32, between casts, what the code of a float32 or float16 model computes in bfloat16.

ONNX Runtime's CPU provider has no bfloat16 kernels for most operators, but it casts. torch, too, computes one operation
in bfloat16 with float32's arithmetic and rounds the result.

No translation may lose a cast: a norm, a softmax or a table of angles that is computed in half precision, and in the
model's code in float32, differs from it by a few roundings. No tolerance of outputs in half precision is as narrow as
that, but the dtypes of the values show it.
"""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from peftfx.analysis.dataflow import names, op_name
from peftfx.analysis.weight_ops import module_path
from peftfx.bases.dtypes import HALF_DTYPES
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Cursor, Rewriter
from peftfx.passes.optimization.cleanup import CASTS

_NARROW, _WIDE = torch.bfloat16, torch.float32
#: Operations for which torch rounds a number in the code to the dtype of their result.
ROUNDS_NUMBERS = names("add sub rsub remainder fmod pow eq ne lt le gt ge")
LOST_HINT = "this is a fault of peftfx: report this model; export it in float32 until then"
_cast = torch.ops.aten._to_copy.default
#: Operations in which torch takes the number itself. Others that do have it as an attribute in ONNX, in float32.
_SCALED = names("mul div addcmul addcdiv baddbmm lerp softplus")
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
        at, rounds, value = rewriter.before(node), op_name(node) in ROUNDS_NUMBERS, node.meta["val"]
        node.args, node.kwargs = (_widened(given, at, rounds=rounds) for given in (node.args, node.kwargs))
        rewriter.revalue(node, _wide(value))
        if isinstance(value, torch.Tensor) and value.dtype == _NARROW:
            rewriter.extend(node, rewriter.after(node).call(_cast, node, dtype=_NARROW))
        _round_parts(rewriter, node)


def scale_exactly(rewriter: Rewriter, node: fx.Node) -> None:
    """Multiply or divide values in half precision by a number that half precision lacks, in float32 between casts.

    torch computes with the number itself, as with `1 / sqrt(width)` of heads. In ONNX it would be rounded: each result
    would be off by the same factor.
    """
    value, given = node.meta.get("val"), (*node.args, *node.kwargs.values())
    if op_name(node) not in _SCALED or not isinstance(value, Tensor) or value.dtype not in HALF_DTYPES:
        return
    if all(rounded(one, value.dtype) == one for one in given if not isinstance(one, fx.Node)):
        return
    at = rewriter.before(node)
    for x in [one for one in node.all_input_nodes if _float_dtype(one.meta["val"]) == value.dtype]:
        node.replace_input_with(x, at.call(_cast, x, dtype=_WIDE))
    rewriter.revalue(node, value.to(_WIDE))
    rewriter.extend(node, rewriter.after(node).call(_cast, node, dtype=value.dtype))


def rounded(one: Any, dtype: torch.dtype) -> Any:
    """Return a number as it is in a dtype. One that the dtype has, and what is no number, is returned unchanged."""
    if type(one) not in (int, float):
        return one
    near = torch.tensor(float(one), dtype=dtype).item()
    return one if near == one else near


def scale_queries(rewriter: Rewriter) -> None:
    """Scale the queries of attentions in half precision ahead, exactly, where the attention has no operator of its own.

    Its translation multiplies queries and keys by the square root of the scale, which half precision rounds.
    """
    for node in [node for node in rewriter.graph.nodes if node.target is _SDPA]:
        query, value = node.args[0], node.meta["val"]
        given = node.kwargs.get("scale")
        width = query.meta["val"].shape[-1]
        scale = given if given is not None else width**-0.5 if isinstance(width, int) else None
        if value.dtype in HALF_DTYPES and isinstance(scale, float):
            scaled = rewriter.before(node).call(torch.ops.aten.mul.Tensor, query, scale)
            node.args, node.kwargs = (scaled, *node.args[1:]), {**node.kwargs, "scale": 1.0}
            scale_exactly(rewriter, scaled)


def attend_in_float32(rewriter: Rewriter, node: fx.Node) -> None:
    """Compute an attention in half precision in float32, between casts, if its mask is in float32, as torch does it.

    ONNX has no operator for both. A mask in half precision would lose numbers such as -1e9, which float16 lacks.
    """
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    value = node.meta["val"]
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != _WIDE or value.dtype not in HALF_DTYPES:
        return
    at = rewriter.before(node)
    for given in dict.fromkeys(node.args[:3]):
        node.replace_input_with(given, at.call(_cast, given, dtype=_WIDE))  # type: ignore[arg-type]
    rewriter.revalue(node, value.to(_WIDE))
    rewriter.extend(node, rewriter.after(node).call(_cast, node, dtype=value.dtype))


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
        return _WIDE if one is _NARROW else rounded(one, _NARROW) if rounds else one

    return fx.node.map_aggregate(arguments, widen)


def _round_parts(rewriter: Rewriter, made: fx.Node) -> None:
    for part in [user for user in made.users if user.target is operator.getitem]:
        if _is_narrow(part):
            rewriter.revalue(part, made.meta["val"][part.args[1]])
            rewriter.extend(part, rewriter.after(part).call(_cast, part, dtype=_NARROW))


def refuse_narrowed(before: Graph, after: Graph) -> None:
    """Refuse a rewritten graph in which an operation computes in fewer bits than before the rewrite.

    Operations are compared by their names, which a copy of a graph keeps. Those that a rewrite put in the place of
    others have the dtype of what they replaced, or the operations behind them have not theirs.

    Raises:
        PeftfxError: an operation computes in fewer bits.
    """
    kept = {node.name: node for node in before.nodes() if node.op == "call_function"}
    for node in after.nodes():
        old = kept.get(node.name)
        if old is None or old.target is not node.target:
            continue
        was, now = (_float_dtype(one.meta.get("val")) for one in (old, node))
        if was is not None and now is not None and now.itemsize < was.itemsize:
            raise _refused(node, f"{was} in the model's code, {now} in the graph")


def refuse_retyped(node: fx.Node, value: ir.Value) -> None:
    """Refuse an operation whose result has another dtype in ONNX than in the graph.

    Raises:
        PeftfxError: it has another dtype.
    """
    wanted = _float_dtype(node.meta.get("val"))
    if wanted is None or value.dtype is None:
        return
    if value.dtype != ir.tensor_adapters.from_torch_dtype(wanted):
        raise _refused(node, f"{wanted} in the model's code, {value.dtype} in ONNX")


def _refused(node: fx.Node, told: str) -> PeftfxError:
    return PeftfxError(
        f"an operation lost its dtype ({node.target}): {told}", module_path(node) or node.name, LOST_HINT
    )


def _float_dtype(value: object) -> torch.dtype | None:
    """Return the dtype of a tensor of floating-point numbers; None for another value."""
    return value.dtype if isinstance(value, Tensor) and value.dtype.is_floating_point else None
