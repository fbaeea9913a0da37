"""What a translation has to keep of the dtypes of a graph: nothing computes in fewer bits than in the model's code.

A norm, a softmax or a table of angles that lost its cast to float32 differs from the model by a few roundings. No
tolerance of outputs in half precision is as narrow as that, but the dtypes of the values show it.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, fx

from peftfx.analysis.weight_ops import module_path
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph

_HINT = "this is a fault of peftfx: report this model; export it in float32 until then"


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
        was, now = (_dtype(one.meta.get("val")) for one in (old, node))
        if was is not None and now is not None and now.itemsize < was.itemsize:
            raise _refused(node, f"{was} in the model's code, {now} in the graph")


def refuse_retyped(node: fx.Node, value: ir.Value) -> None:
    """Refuse an operation whose result has another dtype in ONNX than in the graph.

    Raises:
        PeftfxError: it has another dtype.
    """
    wanted = _dtype(node.meta.get("val"))
    if wanted is None or value.dtype is None:
        return
    if value.dtype != ir.tensor_adapters.from_torch_dtype(wanted):
        raise _refused(node, f"{wanted} in the model's code, {value.dtype} in ONNX")


def _refused(node: fx.Node, told: str) -> PeftfxError:
    return PeftfxError(f"an operation lost its dtype ({node.target}): {told}", module_path(node) or node.name, _HINT)


def _dtype(value: object) -> torch.dtype | None:
    """Return the dtype of a tensor of floating-point numbers; None for another value."""
    return value.dtype if isinstance(value, Tensor) and value.dtype.is_floating_point else None
