"""Weights of 16 bits are cast to float32 once for all calls of a part.

ONNX Runtime's CPU provider multiplies in float32: it casts each weight in each call, into new memory. Here the cast is
made before the calls, and the products read its result. The result of a product is rounded to the weight's type, as the
graph says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from onnx import NodeProto, TensorProto, helper

from peftfx.export.verification.graph_parts import HALVES, ModelPart, reads_of

_PRODUCTS = ("MatMul", "Gemm")


def with_wide_weights(part: ModelPart, slots: Collection[str]) -> ModelPart:
    """Return a part that reads weights of 16 bits in float32, where all their readers compute in float32.

    Args:
        part: the part.
        slots: the names of weights that a call may replace by other values. They stay as they are.
    """
    halves = {w.tensor.name: w.tensor.data_type for w in part.weights if w.tensor.data_type in HALVES}
    reads = [reads_of(node) for node in part.nodes]
    inner = {name for node, names in zip(part.nodes, reads, strict=True) for name in names if name not in node.input}
    takes = [_takes(node, inner.union(part.wanted)) for node in part.nodes]
    wide = {
        half: kind
        for half, kind in halves.items()
        if half not in slots and all(fit for fit, names in zip(takes, reads, strict=True) if half in names)
    }
    return replace(part, nodes=list(_in_float32(part.nodes, wide)), wide=wide) if wide else part


def _takes(node: NodeProto, kept: Collection[str]) -> bool:
    """Say whether a node is a product in half precision, or a cast to float32 that is not in `kept`.

    In `kept` are the values that have to be made by a node: graphs in attributes or later parts read them.
    """
    if node.op_type in _PRODUCTS and not node.domain:
        return True
    return _is_cast(node) and node.output[0] not in kept


def _is_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute)


def _in_float32(nodes: Sequence[NodeProto], wide: Mapping[str, int]) -> Iterator[NodeProto]:
    """Yield nodes that read the weights in `wide` in float32, and compute what `nodes` compute."""
    names: dict[str, str] = {}  # of the casts of the weights, which are the weights now
    for node in nodes:
        if _is_cast(node) and node.input[0] in wide:
            names[node.output[0]] = node.input[0]
        elif node.op_type in _PRODUCTS and any(name in wide for name in node.input):
            yield from _product(node, wide)
        elif any(name in names for name in node.input):
            renamed = NodeProto()
            renamed.CopyFrom(node)
            renamed.input[:] = [names.get(name, name) for name in node.input]
            yield renamed
        else:
            yield node


def _product(node: NodeProto, wide: Mapping[str, int]) -> Iterator[NodeProto]:
    """Yield a product in float32, with casts of its other inputs before it and a cast of its result after it."""
    (result,) = node.output
    own = {name: f"{result}/{number}" for number, name in enumerate(node.input) if name and name not in wide}
    for name, cast in own.items():
        yield helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT)
    product = NodeProto()
    product.CopyFrom(node)
    product.input[:] = [own.get(name, name) for name in node.input]
    product.output[:] = [f"{result}/wide"]
    yield product
    kind = next(wide[name] for name in node.input if name in wide)
    yield helper.make_node("Cast", [f"{result}/wide"], [result], to=kind)
