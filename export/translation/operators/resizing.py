"""A translation of `nearest-exact` enlargements, for which torch's exporter has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import opset18

_op: Any = opset18  # its type hints ask for tensors, but numbers work


def _nearest_exact(self: Any, output_size: Any, scale_factors: Sequence[float] | None) -> Any:
    """Copy the value whose middle is nearest to that of the new place: `floor((i + 0.5) / scale)`."""
    how = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
    if scale_factors is not None:
        return _op.Resize(self, None, _op.Constant(value_floats=[1.0, 1.0, *scale_factors]), None, **how)
    size = _op.Concat(_op.Shape(self, start=0, end=2), _op.Cast(output_size, to=7), axis=0)
    return _op.Resize(self, None, None, size, **how)


RESIZING: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten._upsample_nearest_exact2d.vec: _nearest_exact,
    torch.ops.aten._upsample_nearest_exact3d.vec: _nearest_exact,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
