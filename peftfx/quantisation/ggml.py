"""GGUF's blocks, as llama.cpp packs them: which bytes of a block are codes, and which are scales.

https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c (dequantize_row_*)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked

_Read = Callable[[Tensor], Unpacked]


@dataclass(frozen=True)
class Layout:
    """The layout of a type of blocks.

    Attributes:
        columns: the columns of a block in the file.
        size: the bytes of a block in the file.
        bits: the bits of a code.
        block: how many columns share a scale.
        zero: the zero of all codes.
        read: a function that unpacks uint8 [out, blocks, size].
        shifted: whether each block has a least value.
    """

    columns: int
    size: int
    bits: int
    block: int
    zero: int
    read: _Read
    shifted: bool = False


def blocks(name: str, data: Tensor, columns: int, order: Tensor | None) -> Blocks:
    """Return the codes of a weight.

    Args:
        name: the name of the type, one of `LAYOUTS`.
        data: uint8 [out, bytes of a row], memory-mapped.
        columns: the weight's number of columns.
        order: int64 [out], the file's row of each row of the weight; None for the same order.

    Raises:
        ValueError: the rows' bytes do not fit the number of columns.
    """
    layout = LAYOUTS[name]
    if columns % layout.columns or data.shape[1] != columns // layout.columns * layout.size:
        raise ValueError(f"{name} has {data.shape[1]} bytes for {columns} columns")
    unpack = functools.partial(_unpack, layout, data, order)
    title = f"GGUF {name}"
    return Blocks(title, len(data), columns, layout.bits, layout.block, unpack, layout.zero, shifted=layout.shifted)


def _unpack(layout: Layout, data: Tensor, order: Tensor | None) -> Unpacked:
    rows = data if order is None else data[order]
    found = layout.read(rows.unflatten(1, (-1, layout.size)))
    flat = None if found.least is None else found.least.flatten(1).contiguous()
    return Unpacked(found.integers.flatten(1).contiguous(), found.scales.flatten(1).contiguous(), None, flat)


def _half(raw: Tensor, start: int) -> Tensor:
    """Return float32 [out, blocks, 1] of the float16 at byte `start` of each block."""
    return raw[..., start : start + 2].contiguous().view(torch.float16).float()


def _halves(raw: Tensor) -> Tensor:
    """Return the low halves of bytes, then the high halves, along the last axis."""
    return torch.cat([raw & 15, raw >> 4], -1)


def _fifths(raw: Tensor) -> Tensor:
    """Return uint8 [..., 32] of 0 and 16: the fifth bits in four bytes, the lowest first."""
    return ((raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) << 4


def _q4_0(raw: Tensor) -> Unpacked:
    return Unpacked(_halves(raw[..., 2:]), _half(raw, 0))


def _q4_1(raw: Tensor) -> Unpacked:
    return Unpacked(_halves(raw[..., 4:]), _half(raw, 0), least=-_half(raw, 2))


def _q5_0(raw: Tensor) -> Unpacked:
    return Unpacked(_halves(raw[..., 6:]) | _fifths(raw[..., 2:6]), _half(raw, 0))


def _q5_1(raw: Tensor) -> Unpacked:
    return Unpacked(_halves(raw[..., 8:]) | _fifths(raw[..., 4:8]), _half(raw, 0), least=-_half(raw, 2))


def _q8_0(raw: Tensor) -> Unpacked:
    return Unpacked(raw[..., 2:] ^ 128, _half(raw, 0))  # int8 in two's complement, plus 128


def _scales_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 [out, blocks, 8] scales and least values, of 6 bits each in twelve bytes."""
    low, middle, high = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], -1)
    least = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], -1)
    return _half(raw, 0) * scales, _half(raw, 2) * least


def _q4_k(raw: Tensor) -> Unpacked:
    scales, least = _scales_k(raw)
    return Unpacked(_halves(raw[..., 16:].unflatten(-1, (4, 32))).flatten(-2), scales, least=least)


def _q5_k(raw: Tensor) -> Unpacked:
    scales, least = _scales_k(raw)
    codes = _halves(raw[..., 48:].unflatten(-1, (4, 32))).flatten(-2).unflatten(-1, (8, 32))
    fifths = raw[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(-1) & 1
    return Unpacked((codes | fifths << 4).flatten(-2), scales, least=least)


def _q6_k(raw: Tensor) -> Unpacked:
    low = _halves(raw[..., :128].unflatten(-1, (2, 64)))  # for each half of 128 columns
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    high = (raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-2)
    scales = raw[..., 192:208].contiguous().view(torch.int8).float() * _half(raw, 208)
    return Unpacked((low | high << 4).flatten(-2), scales)


LAYOUTS: Mapping[str, Layout] = {
    "Q4_0": Layout(32, 18, 4, 32, 8, _q4_0),
    "Q4_1": Layout(32, 20, 4, 32, 0, _q4_1, shifted=True),
    "Q5_0": Layout(32, 22, 5, 32, 16, _q5_0),
    "Q5_1": Layout(32, 24, 5, 32, 0, _q5_1, shifted=True),
    "Q8_0": Layout(32, 34, 8, 32, 128, _q8_0),
    "Q4_K": Layout(256, 144, 4, 32, 0, _q4_k, shifted=True),
    "Q5_K": Layout(256, 176, 5, 32, 0, _q5_k, shifted=True),
    "Q6_K": Layout(256, 210, 6, 16, 32, _q6_k),
}
