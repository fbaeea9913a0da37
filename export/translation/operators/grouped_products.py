"""A translation of experts' grouped products: a product for each expert, and one split of all rows.

transformers' translation computes the places of each expert's rows and gathers them, by five nodes for each expert. In
a model with many experts, most of a session's start and half of a step with one token goes into these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  # it registers the operator of dtypes that torch's own does not take
from onnxscript import opset18
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

_op: Any = opset18  # its type hints ask for tensors, but numbers work


def _grouped(mat_a: Any, mat_b: Any, offs: Any, *, out_dtype: torch.dtype | None = None) -> Any:
    """Return the product of each row with the matrix of its group, [rows, n]. A group may have no rows.

    ONNX Runtime folds the matrices once, without their first axis: it packs only matrices of two axes for its products.

    Args:
        mat_a: rows [rows, k], sorted by group.
        mat_b: a matrix for each group, [groups, k, n].
        offs: the end of each group's rows, [groups].
        out_dtype: the dtype of the result. torch takes that of the rows alone; and it takes no bias.
    """
    groups = int(mat_b.shape[0])
    ends = _op.Cast(offs, to=7)
    zero, last = _op.Constant(value_ints=[0]), _op.Constant(value_ints=[-1])
    starts = _op.Concat(zero, _op.Slice(ends, zero, last), axis=0)
    rows = call_op("Split", mat_a, _op.Sub(ends, starts), _num_outputs=groups, axis=0)
    matrices = [_op.Squeeze(matrix, zero) for matrix in _parts(mat_b, groups)]
    products = [_op.MatMul(*pair) for pair in zip(rows, matrices, strict=True)]
    return _op.Concat(*products, axis=0)


def _parts(value: Any, count: int) -> Sequence[Any]:
    """Return the equal parts of a tensor along its first axis."""
    parts: Sequence[Any] = call_op("Split", value, _num_outputs=count, axis=0, num_outputs=count)
    return parts


GROUPED_PRODUCTS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten._grouped_mm.default: _grouped,
    torch.ops.transformers.grouped_mm_fallback.default: _grouped,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
