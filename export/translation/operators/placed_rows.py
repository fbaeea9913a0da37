"""The operator `peftfx::place_rows`: rows written at the places of a mask, as many as there are places.

It is `index_put` with one mask in torch, which repeats a single row, or a single number in each row. ONNX's `ScatterND`
refuses another number of rows than of places, none included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor

_op: Any = opset18  # its type hints ask for tensors, but numbers work


@torch.library.custom_op("peftfx::place_rows", mutates_args=())
def place_rows(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """Write rows at the places of a mask, in order.

    Args:
        x: [*places, *row].
        mask: bool[*places].
        rows: [number of places that the mask shows, or 1, *row], in the dtype of `x`.

    Returns:
        A copy of `x` with the rows.
    """
    return x.index_put((mask,), rows)


@place_rows.register_fake
def _(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _place_rows(x: Any, mask: Any, rows: Any) -> Any:
    index = _op.Transpose(_op.NonZero(mask), perm=[1, 0])
    one, places = _op.Constant(value_ints=[1]), _op.Shape(index, start=0, end=1)
    times = _op.Where(_op.Equal(_op.Shape(rows, start=0, end=1), one), places, one)
    shape = _op.Concat(times, _op.Shape(x, start=len(mask.shape)), axis=0)
    return _op.ScatterND(x, index, _op.Expand(rows, shape))


PLACED_ROWS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.peftfx.place_rows.default: _place_rows,
}
"""Translations by operator, for `torch.onnx.export(custom_translation_table=...)`."""
