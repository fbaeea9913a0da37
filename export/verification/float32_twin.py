"""The float32 twin of a bfloat16 model: ONNX Runtime's CPU provider can run it, and it reads the same weights.

The twin computes each operation in float32, and rounds its result to bfloat16 where the model's result is in bfloat16,
as a provider with kernels for bfloat16 does, and torch. So it shows what is lost where a graph computes in bfloat16
what it should compute in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from peftfx.errors import first_line
from peftfx.export.translation.to_onnx import every_value
from peftfx.export.verification.comparison import VerificationError

_NAME, _UNROUNDED = ".float32-twin.onnx", ".unrounded.onnx"
_BFLOAT16 = onnx.TensorProto.BFLOAT16
_NARROW = (ir.DataType.BFLOAT16,)
_HALVES = (*_NARROW, ir.DataType.FLOAT16)
_TYPED = ("to", "dtype")  #: the attributes that name a dtype
_RUN = frozenset({"Cast", "Constant", "If", "Loop", "Scan"})
#: Operators that move numbers and compute none, and those whose inner operations are rounded.
_MOVES = frozenset(
    {
        *("Constant", "Identity", "If", "Loop", "Scan", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"),
        *("Expand", "Tile", "Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "Where", "Trilu"),
    }
)


@contextmanager
def runnable(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the model itself, or its float32 twin if it computes in bfloat16, and whether it is the twin.

    The CPU provider has no bfloat16 kernels for most operators. The twin reads the same data file, casts each weight
    when it is used, computes in float32, and rounds each result. It shows that the graph and the weights are right. Its
    file is removed afterwards.

    Raises:
        VerificationError: ONNX Runtime refuses the model itself for another reason than its lack of kernels, such as
            operands of two types.
    """
    proto = onnx.load(path, load_external_data=False)
    model = ir.load(path) if _names_bfloat16(proto.graph) else None
    if model is None or not in_bfloat16(model):
        yield path, False
        return
    _refuse_invalid(path)
    rounded = [value for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in _computed(node)]
    _widen(model, _NARROW)
    for value in rounded:
        _round(value)
    with _saved(model, path.with_name(_NAME)) as twin:
        yield twin, True


@contextmanager
def unrounded(path: Path) -> Iterator[Path | None]:
    """Yield a twin that computes all in float32, without rounding; None if the model computes none in half precision.

    The twin's file is removed afterwards.
    """
    model = ir.load(path)
    if not any(computes_in(model, kind) for kind in _HALVES):
        yield None
        return
    _widen(model, _HALVES)
    with _saved(model, path.with_name(_UNROUNDED)) as twin:
        yield twin


@contextmanager
def _saved(model: ir.Model, path: Path) -> Iterator[Path]:
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _refuse_invalid(path: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except NoKernel:
        return
    except Exception as error:
        what = f"ONNX Runtime refuses the model: {first_line(error)}"
        raise VerificationError(what, str(path), "report this model") from error


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
    return computes_in(model, ir.DataType.BFLOAT16)


def computes_in(model: ir.Model, kind: ir.DataType) -> bool:
    """Say whether the model computes in this dtype, or takes or gives it, and not only casts it."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return any(value.dtype == kind for value in values) or any(
        _computes(node, kind) for node in ir.traversal.RecursiveGraphIterator(model.graph)
    )


def _computes(node: ir.Node, kind: ir.DataType) -> bool:
    """Say whether a node computes in this dtype. Casts, constants and branches run on every provider."""
    values = (value for value in (*node.inputs, *node.outputs) if value is not None)
    return node.op_type not in _RUN and any(value.dtype == kind for value in values)


def _widen(model: ir.Model, kinds: Collection[ir.DataType]) -> None:
    """Turn all values of these dtypes into float32, but cast initializers (also those that are inputs)."""
    for value in every_value(model.graph):
        if not value.is_initializer() and value.dtype in kinds:
            value.dtype = ir.DataType.FLOAT
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in kinds:
                wide = ir.tensor(attribute.value.numpy().astype("float32"), name=attribute.value.name)
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
            elif attribute.name in _TYPED and attribute.value in kinds:
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    place = {node: index for index, node in enumerate(model.graph)}
    for value in list(model.graph.initializers.values()):
        if value.dtype in kinds:
            users = [user for user in value.consumers() if user in place]
            first = min(users, key=lambda user: place[user]) if users else model.graph[0]
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            model.graph.insert_before(first, cast)  # as late as possible: a cast weight waits in memory


def _computed(node: ir.Node) -> list[ir.Value]:
    """Return the results of a node in bfloat16, if the node computes them."""
    if node.op_type in _MOVES:
        return []
    return [value for value in node.outputs if value.dtype == ir.DataType.BFLOAT16]


def _round(value: ir.Value) -> None:
    """Give all readers of a float32 value its number in bfloat16."""
    node = value.producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    narrow = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
    wide = ir.node("Cast", narrow.outputs, {"to": int(ir.DataType.FLOAT)})
    for cast, dtype in ((narrow, ir.DataType.BFLOAT16), (wide, ir.DataType.FLOAT)):
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    (result,), name = wide.outputs, value.name
    ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    value.name, narrow.outputs[0].name, result.name = f"{name}.unrounded", f"{name}.narrow", name
    node.graph.insert_after(node, [narrow, wide])
