"""AWQ in AutoAWQ's layout `gemm`: 4 bits, eight columns of the transposed weight in one word, reordered.

https://github.com/casper-hansen/AutoAWQ/blob/main/awq/utils/packing_utils.py
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked
from peftfx.quantisation.packed import Packed, nibbles

MARKS = ("qweight",)
NAMES = frozenset({"qweight", "qzeros", "scales"})
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  #: the row of each of a word's codes


def read(packed: Packed) -> Blocks:
    """Return a layer's codes.

    Raises:
        PeftfxError: the version is not `gemm`, the number of bits is not 4, or the shapes do not fit.
    """
    packed.integer("bits", 4)
    version = str(packed.config.get("version", "gemm")).lower()
    if version != "gemm":
        raise packed.wrong(f"its version is {version!r}, but peftfx reads only gemm")
    weight, zeros, scales = packed.words_and_scales()
    columns, rows = weight.shape[0], weight.shape[1] * 8
    size = packed.integer("group_size")
    block = columns if size == -1 else size
    if block < 1 or columns % block:
        raise packed.wrong(f"group_size is {size}, which does not divide the {columns} columns")
    packed.check("scales", (columns // block, rows))
    packed.check("qzeros", (columns // block, rows // 8))
    unpack = functools.partial(_unpack, weight, zeros, scales)
    return Blocks("AWQ int4", rows, columns, 4, block, unpack, own_zeros=True)


def _unpack(weight: Tensor, zeros: Tensor, scales: Tensor) -> Unpacked:
    return Unpacked(_rows(weight).contiguous(), scales.T.float(), _rows(zeros).to(torch.int16))


def _rows(words: Tensor) -> Tensor:
    """Return uint8 [out, n] of the int32 words [n, out / 8]."""
    codes = nibbles(words, 4).unflatten(1, (-1, 8))
    back = torch.argsort(torch.tensor(_ORDER))
    return codes.index_select(2, back).flatten(1).T
