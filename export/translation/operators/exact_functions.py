"""Exact translations of functions that torch's exporter translates with a loss of precision near zero.

`exp(x) - 1`, `log(1 + x)` and `log(sigmoid(x))`, computed literally, take the difference or the logarithm of numbers
near 1. In float32, a small result then loses all its digits. The functions here keep the relative error of the
operators that they use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18

op: Any = opset18  # its type hints ask for tensors, but numbers work


def expm1(self: Any) -> Any:
    """Compute `exp(x) - 1` as `tanh(x / 2) (exp(x) + 1)`."""
    half, one = (op.CastLike(op.Constant(value_float=number), self) for number in (0.5, 1.0))
    return op.Mul(op.Tanh(op.Mul(self, half)), op.Add(op.Exp(self), one))


def log1p(self: Any) -> Any:
    """Compute `log(1 + x)` as `log(u) x / (u - 1)`, with `u = 1 + x` rounded (Kahan); for x > 1, as `log(u)`."""
    one = op.CastLike(op.Constant(value_float=1.0), self)
    rounded = op.Add(self, one)
    plain = op.Log(rounded)
    near = op.Where(op.Equal(rounded, one), self, op.Mul(plain, op.Div(self, op.Sub(rounded, one))))
    return op.Where(op.Greater(self, one), plain, near)


def log_sigmoid(self: Any) -> Any:
    """Compute `log(sigmoid(x))` as `-softplus(-x)`."""
    return op.Neg(op.Softplus(op.Neg(self)))


EXACT: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten.expm1.default: expm1,
    torch.ops.aten.log1p.default: log1p,
    torch.ops.aten.log_sigmoid.default: log_sigmoid,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
