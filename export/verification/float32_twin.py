"""The float32 twin of a bfloat16 model: ONNX Runtime's CPU provider can run it, and it reads the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from peftfx.export.translation.to_onnx import every_value

_NAME = ".float32-twin.onnx"
_BFLOAT16 = onnx.TensorProto.BFLOAT16
_TYPED = ("to", "dtype")  #: the attributes that name a dtype
_RUN = frozenset({"Cast", "Constant", "If", "Loop", "Scan"})


@contextmanager
def runnable(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the model itself, or its float32 twin if it computes in bfloat16, and whether it is the twin.

    The CPU provider has no bfloat16 kernels for most operators. The twin reads the same data file, casts each weight
    when it is used, and computes in float32. It shows that the graph and the weights are right. Its file is removed
    afterwards.
    """
    proto = onnx.load(path, load_external_data=False)
    model = ir.load(path) if _names_bfloat16(proto.graph) else None
    if model is None or not in_bfloat16(model):
        yield path, False
        return
    _widen(model)
    twin = path.with_name(_NAME)
    try:
        ir.save(model, twin)
        yield twin, True
    finally:
        twin.unlink(missing_ok=True)


def _names_bfloat16(graph: onnx.GraphProto) -> bool:
    """Say whether a graph names bfloat16 anywhere, also in its branches and loops. To read it whole takes far longer.

    Args:
        graph: a graph whose values have their types written, as in our exports.
    """
    values = (*graph.input, *graph.output, *graph.value_info)
    tensors = (*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t")))
    inner = (g for node in graph.node for a in node.attribute for g in (*a.graphs, *([a.g] if a.HasField("g") else ())))
    return (
        any(value.type.tensor_type.elem_type == _BFLOAT16 for value in values)
        or any(tensor.data_type == _BFLOAT16 for tensor in tensors)
        or any(map(_names_bfloat16, inner))
    )


def in_bfloat16(model: ir.Model) -> bool:
    """Say whether the model computes in bfloat16, or takes or gives it, and not only casts it."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values) or any(
        map(_computes, ir.traversal.RecursiveGraphIterator(model.graph))
    )


def _computes(node: ir.Node) -> bool:
    """Say whether a node computes in bfloat16. Casts, constants and branches run on every provider."""
    values = (value for value in (*node.inputs, *node.outputs) if value is not None)
    return node.op_type not in _RUN and any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def _widen(model: ir.Model) -> None:
    """Turn every bfloat16 value into float32, except initializers (also those that are inputs), which are cast."""
    for value in every_value(model.graph):
        if not value.is_initializer() and value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                wide = ir.tensor(attribute.value.numpy().astype("float32"), name=attribute.value.name)
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
            elif attribute.name in _TYPED and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    place = {node: index for index, node in enumerate(model.graph)}
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            users = [user for user in value.consumers() if user in place]
            first = min(users, key=lambda user: place[user]) if users else model.graph[0]
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            model.graph.insert_before(first, cast)  # as late as possible: a cast weight waits in memory
