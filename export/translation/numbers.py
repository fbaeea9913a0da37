"""Compute operators that ONNX lacks at export time if they are applied only to constants in the model's code."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.graph.graph import CONSTANTS, Graph
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
_WITHOUT_ONNX = {_aten.erfinv.default, _aten.special_erfinv.default, _aten.special_ndtri.default}


def compute_numbers(rewriter: Rewriter, graph: Graph) -> None:
    """Replace operators that ONNX lacks by their results, in place, if they depend on no input of the model."""
    for node in list(graph.nodes()):
        if node.target not in _WITHOUT_ONNX or node.meta["val"].numel() != 1:
            continue
        if (value := _number(node, graph)) is not None:
            shape, dtype = [1] * value.ndim, value.dtype
            made = rewriter.before(node).call(_aten.full.default, shape, value.item(), dtype=dtype)
            rewriter.replace(node, made)


def _number(node: fx.Node, graph: Graph) -> Tensor | None:
    """Return the value of a node that is computed only from constants, or None."""
    if node.op == "get_attr" and str(node.target).startswith(f"{CONSTANTS}."):
        constant = graph.get(str(node.target))
        return None if isinstance(constant, FakeTensor) or constant.is_meta else constant
    if node.op != "call_function":
        return None
    values: dict[fx.Node, Tensor] = {}
    for source in node.all_input_nodes:
        if (value := _number(source, graph)) is None:
            return None
        values[source] = value
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: values[source])
    with torch.no_grad():
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    return found if isinstance(found, Tensor) else None
