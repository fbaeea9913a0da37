"""fp8 (e4m3) with one scale for a weight, for each row, or for each block: files of DeepSeek, FBGEMM and others.

https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftfx.quantisation.codes import Floats8
from peftfx.quantisation.packed import Packed

MARKS = ("weight_scale_inv", "weight_scale")
NAMES = frozenset({"weight", *MARKS, "activation_scale", "input_scale", "input_scale_ub"})
E4M3 = torch.float8_e4m3fn


def read(packed: Packed) -> Floats8:
    """Return a layer's codes. Settings for activations are ignored: activations are not rounded.

    Raises:
        PeftfxError: the 8-bit float is not e4m3, or the shapes do not fit.
    """
    mark = next(name for name in MARKS if name in packed.tensors)
    scale = packed.get(mark, torch.float32, torch.float16, torch.bfloat16)
    return floats8(packed, "fp8", packed.get("weight", E4M3), scale)


def floats8(packed: Packed, name: str, weight: Tensor, scale: Tensor) -> Floats8:
    """Return codes of e4m3, with scales of the weight, of rows or of blocks.

    Raises:
        PeftfxError: the scale fits no blocks of the weight.
    """
    if weight.ndim != 2:
        raise packed.wrong(f"the weight is not a matrix: {list(weight.shape)}")
    rows, columns = weight.shape
    grid = (1, 1) if scale.numel() == 1 else tuple(scale.shape)
    size = _block(packed, rows, columns, grid) if len(grid) == 2 else None
    if size is None:
        raise packed.wrong(f"the shapes do not fit: scale {list(scale.shape)}, weight {list(weight.shape)}")
    scales = functools.partial(_scales, scale, grid, size[0], rows)
    return Floats8(name, rows, columns, size[1], weight, scales)


def _block(packed: Packed, rows: int, columns: int, grid: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, or None if the grid does not fit."""
    said = packed.config.get("weight_block_size")
    known = isinstance(said, list) and len(said) == 2 and all(isinstance(n, int) and n > 0 for n in said)
    if known and grid == (-(-rows // said[0]), -(-columns // said[1])):  # type: ignore[index]
        return min(said[0], rows), min(said[1], columns)  # type: ignore[index]
    if rows % grid[0] or columns % grid[1]:
        return None
    return rows // grid[0], columns // grid[1]


def _scales(scale: Tensor, grid: tuple[int, ...], height: int, rows: int) -> Tensor:
    """Return the scales, float32 [out, blocks]."""
    return scale.float().reshape(grid).repeat_interleave(height, 0)[:rows]
