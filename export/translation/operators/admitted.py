"""Casts to float32 around operators that ONNX does not define for bfloat16, such as TopK and, before opset 22, Conv."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

_NARROW, _HALF, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT
_SCATTERS = ("ScatterElements", "ScatterND")
_NAMED = "tensor(bfloat16)"


def cast_where_not_admitted(model: ir.Model) -> None:
    """Let operators compute in float32 if their version takes no bfloat16, and round what they give.

    torch, too, computes in float32 there. A runtime refuses a model with bfloat16 at such an operator. Its provider
    cannot be asked: the CPU's has no kernels in bfloat16 at all. In float16 it has none that add up what is scattered.
    """
    version = model.graph.opset_imports.get("")
    kinds = {value.dtype for value in _values(model.graph)}
    if version is None or not kinds & {_NARROW, _HALF}:
        return
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        schema = _schema(node, version)
        if schema is None or node.graph is None:
            continue
        _tell_dtypes(node, schema)
        if _adds_up(node):
            inputs, outputs = (_of(values, _HALF) for values in (node.inputs, node.outputs))
            _widen(node, inputs, outputs, _HALF)
        _widen(node, _places(node.inputs, schema.inputs), _places(node.outputs, schema.outputs), _NARROW)


def _adds_up(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    return node.op_type in _SCATTERS and reduction is not None and reduction.as_string() != "none"


def _of(values: Sequence[ir.Value | None], kind: ir.DataType) -> list[int]:
    return [i for i, value in enumerate(values) if value is not None and value.dtype == kind]


def _widen(node: ir.Node, inputs: Iterable[int], outputs: Iterable[int], narrow: ir.DataType) -> None:
    """Let a node read these inputs in float32, and round these outputs."""
    assert node.graph is not None
    for place in list(inputs):
        value = node.inputs[place]
        assert value is not None
        cast = ir.node("Cast", [value], {"to": int(_WIDE)}, metadata_props=dict(node.metadata_props))
        cast.outputs[0].name, cast.outputs[0].type = f"{value.name}.wide", ir.TensorType(_WIDE)
        cast.outputs[0].shape = value.shape
        node.graph.insert_before(node, cast)
        node.replace_input_with(place, cast.outputs[0])
    for place in list(outputs):
        _round(node, node.outputs[place], narrow)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _tell_dtypes(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    """Write the dtype of each result that the exporter left open, where it is that of an operand."""
    known = {
        schema.inputs[min(i, len(schema.inputs) - 1)].type_str: value.dtype
        for i, value in enumerate(node.inputs)
        if value is not None and value.dtype is not None and schema.inputs
    }
    for i, value in enumerate(node.outputs):
        own = known.get(schema.outputs[min(i, len(schema.outputs) - 1)].type_str) if schema.outputs else None
        if value.dtype is None and own is not None:
            value.dtype = own


def _round(node: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    """Give the readers of a node's result its rounded value."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    rounded = ir.Value(name=value.name, type=ir.TensorType(narrow), shape=value.shape)
    ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
    value.name, value.type = f"{value.name}.wide", ir.TensorType(_WIDE)
    cast = ir.node("Cast", [value], {"to": int(narrow)}, outputs=[rounded], metadata_props=dict(node.metadata_props))
    graph.insert_after(node, cast)


def _schema(node: ir.Node, version: int) -> onnx.defs.OpSchema | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _places(values: Sequence[ir.Value | None], formal: Sequence[onnx.defs.OpSchema.FormalParameter]) -> Iterator[int]:
    """Yield the places of values in bfloat16 that the operator does not take there; its last parameter may repeat."""
    for i, value in enumerate(values):
        if (
            value is not None
            and value.dtype == _NARROW
            and formal
            and _NAMED not in formal[min(i, len(formal) - 1)].types
        ):
            yield i
