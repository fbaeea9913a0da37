"""GPTQ, as AutoGPTQ and GPTQModel save it: symmetric or not, with or without columns in the order of activations.

https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/nn_modules/qlinear/__init__.py (pack_block)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked
from peftfx.quantisation.grids import in_order
from peftfx.quantisation.packed import Packed, nibbles

MARKS = ("qweight",)
NAMES = frozenset({"qweight", "qzeros", "scales", "g_idx"})


def read(packed: Packed) -> Blocks:
    """Return a layer's codes.

    Raises:
        PeftfxError: the number of bits is unknown, or the shapes do not fit.
    """
    bits = packed.integer("bits", 2, 3, 4, 8)
    weight, zeros, scales = packed.words_and_scales()
    columns, rows = weight.shape[0] * 32 // bits, weight.shape[1]
    if rows * bits % 32:
        raise packed.wrong(f"the {bits}-bit zeros of {rows} rows do not fill whole words")
    size = packed.integer("group_size")
    block = columns if size == -1 else size
    if block < 1:
        raise packed.wrong(f"group_size is {size}")
    count = -(-columns // block)
    packed.check("scales", (count, rows))
    packed.check("qzeros", (count, rows * bits // 32))
    order = None
    if "g_idx" in packed.tensors:
        packed.check("g_idx", (columns,))
        try:
            order = in_order(packed.get("g_idx"), block, columns)
        except ValueError as error:
            raise packed.wrong(str(error)) from error
    more = 0 if packed.config.get("checkpoint_format") == "gptq_v2" else 1  # the format stores zeros minus 1
    unpack = functools.partial(_unpack, bits, weight, zeros, scales, order, more)
    name = f"GPTQ int{bits}" + (", columns in the order of activations" if order is not None else "")
    middle = 1 << bits - 1
    low, high = (int(end) + more for end in nibbles(zeros, bits).aminmax())
    own = (low, high) != (middle, middle)
    return Blocks(name, rows, columns, bits, block, unpack, middle, own_zeros=own, largest_zero=high, order=order)


def _unpack(bits: int, weight: Tensor, zeros: Tensor, scales: Tensor, order: Tensor | None, more: int) -> Unpacked:
    codes = nibbles(weight.T, bits)
    offsets = nibbles(zeros, bits).T.to(torch.int16) + more
    return Unpacked(codes if order is None else codes[:, order], scales.T.float(), offsets)
