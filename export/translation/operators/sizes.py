"""Translations of operators that read sizes, for which torch's exporter has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18


def _numel(self: Any) -> Any:
    return opset18.Size(self)


SIZES: Mapping[Callable[..., object], Callable[..., object]] = {torch.ops.aten.sym_numel.default: _numel}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
