"""Numbers: those of constants are computed at export time, and those computed from sizes become tensors.

Of constants, only what ONNX has no operator for. torch's translations take a number beside a tensor for one that is
known, where its type is not the tensor's or where they have no other form.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.graph.graph import CONSTANTS, Graph
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
_WITHOUT_ONNX = {_aten.erfinv.default, _aten.special_erfinv.default, _aten.special_ndtri.default}
#: Operators that take a number of the tensor's type, whatever computes it.
_TAKING = {_aten.mul.Tensor, _aten.sub.Tensor}
#: Operators of a tensor and a number, and those of two tensors that do the same.
_OF_TENSORS = {
    **{target: target for target in _TAKING},
    _aten.pow.Tensor_Scalar: _aten.pow.Tensor_Tensor,
    _aten.remainder.Scalar: _aten.remainder.Tensor,
    _aten.fmod.Scalar: _aten.fmod.Tensor,
}


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


def make_tensor(rewriter: Rewriter, node: fx.Node) -> bool:
    """Write an operator of a tensor and a number that is computed from sizes with two tensors of the result's dtype."""
    if node.target not in _OF_TENSORS or len(node.args) < 2:
        return False
    x, number = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(number, fx.Node):
        return False
    if not isinstance(number.meta.get("val"), torch.SymInt | torch.SymFloat):
        return False
    at, dtype = rewriter.before(node), node.meta["val"].dtype
    if (same := x.meta["val"].dtype == dtype) and node.target in _TAKING:
        return False
    wide = x if same else at.call(_aten._to_copy.default, x, dtype=dtype)
    made = at.call(_aten.full.default, [], number, dtype=dtype)
    rewriter.update(node, _OF_TENSORS[node.target], wide, made, *node.args[2:], **node.kwargs)
    return True
