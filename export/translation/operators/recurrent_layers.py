"""Translate torch's recurrent layers to ONNX: `LSTM`, `GRU` and `RNN` have other orders of gates, and one bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

from peftfx.analysis.weight_ops import module_path
from peftfx.errors import PeftfxError
from peftfx.graph.capturing.loops.recurrent_layers import recurrent_layer
from peftfx.graph.graph import Graph

_OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
#: The gates in ONNX's order, by their places in torch's.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
_ATTRIBUTES: Mapping[str, dict[str, Any]] = {
    "lstm": {},
    "gru": {"linear_before_reset": 1},
    "rnn_tanh": {"activations": ["Tanh"]},
    "rnn_relu": {"activations": ["Relu"]},
}


def refuse_recurrent_layers(graph: Graph) -> None:
    """Refuse the recurrent layers for which ONNX, or ONNX Runtime's CPU provider, has no operator.

    Raises:
        PeftfxError: such a layer has projections, or its dtype is float16 or float64.
    """
    for node in graph.nodes():
        if node.target is torch.ops.aten.lstm.input:
            what, hint = "an LSTM with projections (proj_size) has no operator in ONNX", "leave proj_size out"
            raise PeftfxError(what, module_path(node), f"{hint}, and project by a linear layer behind it")
        if node.target is recurrent_layer._opoverload and node.meta["val"][0].dtype in _NOT_RUN:
            what = f"ONNX Runtime runs recurrent layers in float32, not in {str(node.meta['val'][0].dtype)[6:]}"
            raise PeftfxError(what, module_path(node), "export a float32 base: model.float()")


_END_THE_PROCESS = frozenset({"GRU", "LSTM"})  #: what ONNX Runtime's operators do for a batch without rows
_NOT_RUN = (torch.float16, torch.float64)  #: bfloat16 is verified in float32


def _recurrent_layer(
    x: Any,
    hidden: Any,
    cell: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    kind: str,
    reverse: bool,
) -> Any:
    """Translate one direction of a layer."""
    gates = _GATES[kind]

    def op(name: str, *inputs: Any, **attributes: Any) -> Any:
        return call_op(name, *inputs, **attributes)[0]

    def constant(*values: int) -> Any:
        return op("Constant", value_ints=list(values))

    def row(value: Any) -> Any:
        """One direction has an axis of its own, the first."""
        return op("Unsqueeze", value, constant(0))

    def ordered(value: Any) -> Any:
        if len(gates) == 1:
            return value
        sizes = constant(*[int(weight_hh.shape[1])] * len(gates))
        parts = call_op("Split", value, sizes, _num_outputs=len(gates), axis=0)
        return op("Concat", *(parts[gate] for gate in gates), axis=0)

    if _OPERATORS[kind] in _END_THE_PROCESS:  # of an empty call, row 1 of a table of one row is asked for: an error
        empty = op("Cast", op("Equal", op("Size", x), op("Constant", value_int=0)), to=ir.DataType.INT64)
        hidden = op("Mul", hidden, op("CastLike", op("Gather", constant(1), empty), hidden))
    bias = None
    if bias_ih is not None and bias_hh is not None:
        bias = row(op("Concat", ordered(bias_ih), ordered(bias_hh), axis=0))
    states = (row(hidden), row(cell)) if kind == "lstm" else (row(hidden),)
    found = call_op(
        _OPERATORS[kind],
        *(x, row(ordered(weight_ih)), row(ordered(weight_hh)), bias, None, *states),
        _num_outputs=1 + len(states),
        hidden_size=int(weight_hh.shape[1]),
        direction="reverse" if reverse else "forward",
        **_ATTRIBUTES[kind],
    )

    y, h, *c = (op("Squeeze", value, constant(axis)) for value, axis in zip(found, (1, 0, 0), strict=False))
    return y, h, c[0] if c else op("Identity", cell)


RECURRENT_LAYERS: Mapping[Callable[..., object], Callable[..., object]] = {
    recurrent_layer._opoverload: _recurrent_layer,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
