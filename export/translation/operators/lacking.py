"""Translations of operators for which torch's exporter has none, and ONNX has one operator or two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

_op: Any = opset18  # its type hints ask for tensors, but numbers work


def _numel(self: Any) -> Any:
    return _op.Size(self)


def _product(inp: Any, dims: Sequence[int] | None = None) -> Any:
    if dims is None:
        return _op.ReduceProd(inp, keepdims=0)
    return _op.ReduceProd(inp, _op.Constant(value_ints=list(dims)), keepdims=0)


def _masked_select(self: Any, mask: Any) -> Any:
    """Choose the values at which the mask is true, in order; both are first repeated to one shape."""
    row = _op.Constant(value_ints=[-1])
    given = _op.Expand(self, _op.Shape(mask))
    chosen = _op.Expand(mask, _op.Shape(given))
    return _op.Compress(_op.Reshape(given, row), _op.Reshape(chosen, row))


def _round(number: Any, places: int | None = None) -> Any:
    """Round a number that is computed from sizes to a whole one; a half goes to the even one, as in Python."""
    return _op.Cast(_op.Round(number), to=ir.DataType.INT64)


LACKING: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten.sym_numel.default: _numel,
    torch.ops.aten.masked_select.default: _masked_select,
    torch.ops.prims.prod.default: _product,
    round: _round,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
