"""Weights in blocks of small integers, as ONNX Runtime's operator has them, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.export.coded.rounded import halves
from peftfx.quantisation.rounding import round_blocks

BLOCK = 32


def pack(weight: Tensor, bits: int, block: int, **options: bool) -> tuple[Tensor, Tensor]:
    """Blocks [out, blocks, bytes] and scales [out, blocks] of a weight [out, in]."""
    made = round_blocks(weight, bits, block, **options)
    return halves(made.integers, bits), made.scales


def unpack(blocks: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """The weight [out, in] that blocks and scales stand for."""
    if bits == 4:
        blocks = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = (blocks.to(scales.dtype) - (1 << bits - 1)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, :columns]
