"""compressed-tensors, as llm-compressor saves it: `pack-quantized` (2 to 8 bits), `int-quantized`, `float-quantized`.

https://github.com/vllm-project/compressed-tensors/tree/main/src/compressed_tensors/compressors
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Codes, Unpacked
from peftfx.quantisation.fp8 import E4M3, floats8
from peftfx.quantisation.grids import bytes_by_block, in_order
from peftfx.quantisation.packed import Packed, nibbles

MARKS = ("weight_packed", "weight_scale")
NAMES = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight"),
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale"),
    }
)
_BITS = tuple(range(2, 9))


def read(packed: Packed) -> Codes:
    """Return a layer's codes. Settings for activations are ignored: activations are not rounded.

    Raises:
        PeftfxError: the format or the number of bits is unknown, or the shapes do not fit.
    """
    if "weight_packed" in packed.tensors:
        return _packed(packed)
    weight = packed.get("weight", torch.int8, E4M3)
    scale = packed.get("weight_scale", torch.float32, torch.float16, torch.bfloat16)
    if weight.dtype == E4M3:
        return floats8(packed, "compressed-tensors fp8", weight, scale)
    rows, columns = weight.shape
    block = columns // scale.shape[-1] if scale.ndim == 2 and scale.shape[-1] else columns
    if scale.shape not in ((), (1,), (rows, 1), (rows, -(-columns // block))):
        raise packed.wrong(f"the shapes do not fit: weight_scale {list(scale.shape)}, weight {list(weight.shape)}")
    zeros = packed.tensors.get("weight_zero_point")
    wide = functools.partial(_by_row, scale, rows)
    name = "compressed-tensors int8"
    if zeros is None or not zeros.any():
        return bytes_by_block(name, weight, block, wide)
    return bytes_by_block(name, weight, block, wide, functools.partial(_by_row, zeros, rows))


def _packed(packed: Packed) -> Blocks:
    weight = packed.get("weight_packed", torch.int32)
    scale = packed.get("weight_scale", torch.float32, torch.float16, torch.bfloat16)
    said = packed.get("weight_shape").tolist()
    if len(said) != 2 or weight.ndim != 2 or min(said) < 1:
        raise packed.wrong(f"the shapes do not fit: weight_shape {said}, weight_packed {list(weight.shape)}")
    rows, columns = map(int, said)
    bits = next((b for b in _BITS if weight.shape == (rows, -(-columns * b // 32))), None)
    if bits is None:
        raise packed.wrong(f"weight_packed {list(weight.shape)} does not fit {said} with 2 to 8 bits")
    if scale.ndim != 2 or len(scale) not in (1, rows) or columns % scale.shape[1]:
        raise packed.wrong(f"weight_scale {list(scale.shape)} does not fit {said}")
    block, order = columns // scale.shape[1], None
    if "weight_g_idx" in packed.tensors and (packed.get("weight_g_idx") >= 0).all():
        packed.check("weight_g_idx", (columns,))
        try:
            order = in_order(packed.get("weight_g_idx"), block, columns)
        except ValueError as error:
            raise packed.wrong(str(error)) from error
    middle, zeros = 1 << bits - 1, packed.tensors.get("weight_zero_point")
    points: Callable[[], Tensor] | None = None
    if zeros is not None and zeros.dtype == torch.int32:
        packed.check("weight_zero_point", (-(-rows * bits // 32), scale.shape[1]))
        points = functools.partial(_points, zeros, bits, rows)
    elif zeros is not None:
        points = functools.partial(_shifted, zeros, rows, middle)
    unpack = functools.partial(_unpack, bits, columns, weight, scale, points, order)
    name = f"compressed-tensors int{bits}"
    return Blocks(name, rows, columns, bits, block, unpack, middle, own_zeros=points is not None, order=order)


def _unpack(
    bits: int,
    columns: int,
    weight: Tensor,
    scale: Tensor,
    points: Callable[[], Tensor] | None,
    order: Tensor | None,
) -> Unpacked:
    codes = nibbles(weight, bits)[:, :columns]
    zeros = None if points is None else points()
    return Unpacked(codes if order is None else codes[:, order], _by_row(scale, len(weight)), zeros)


def _points(zeros: Tensor, bits: int, rows: int) -> Tensor:
    """Return int16 [out, groups] of words in which the zero points of rows are adjacent."""
    return nibbles(zeros.T, bits)[:, :rows].T.to(torch.int16)


def _shifted(zeros: Tensor, rows: int, middle: int) -> Tensor:
    return _by_row(zeros, rows).to(torch.int16) + middle


def _by_row(scale: Tensor, rows: int) -> Tensor:
    """Return float32 [out, groups] of a scale of the whole weight, of each row, or of groups."""
    return (scale.reshape(1, 1) if scale.numel() == 1 else scale).float().expand(rows, -1).contiguous()
