"""Translate recurrences to ONNX: the steps of `peftfx::recurrence` become the body of a `Scan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

from peftfx.graph.capturing.loops.recurrence_operator import recurrence


def _recurrence(query: Any, key: Any, value: Any, decay: Any, beta: Any, state: Any, corrected: bool) -> Any:
    """Translate a recurrence over axis 1 of all inputs except the state."""
    inputs = (query, key, value, decay, beta)
    last, read = call_op(
        "Scan",
        state,
        *inputs,
        _num_outputs=2,
        body=_body(value.dtype, corrected),
        num_scan_inputs=len(inputs),
        scan_input_axes=[1] * len(inputs),
        scan_output_axes=[1],
    )
    return read, last


def _body(dtype: ir.DataType, corrected: bool) -> ir.Graph:
    names = ("state", "query", "key", "value", "decay", "beta")
    given = [ir.Value(name=name, type=ir.TensorType(dtype)) for name in names]
    state, query, key, value, decay, beta = given
    nodes: list[ir.Node] = []

    def call(kind: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs)))
        (made,) = nodes[-1].outputs
        made.name = f"{kind.lower()}_{len(nodes)}"
        return made

    def wider(x: ir.Value, *axes: int) -> ir.Value:
        return call("Unsqueeze", x, number(*axes))

    def number(*values: int) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value_ints": list(values)}))
        nodes[-1].outputs[0].name = f"axes_{len(nodes)}"
        return nodes[-1].outputs[0]

    state = call("Mul", state, wider(decay, -1))
    new = wider(value, -2)
    if corrected:
        new = call("Sub", new, call("MatMul", wider(key, -2), state))
    state = call("Add", state, call("Mul", wider(key, -1), call("Mul", new, wider(beta, -2, -1))))
    read = call("Squeeze", call("MatMul", wider(query, -2), state), number(-2))
    for made in (state, read):
        made.type = ir.TensorType(dtype)
    return ir.Graph(given, [state, read], nodes=nodes, name="recurrence")


RECURRENCES: Mapping[Callable[..., object], Callable[..., object]] = {
    recurrence._opoverload: _recurrence,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
