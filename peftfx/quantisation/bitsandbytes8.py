"""bitsandbytes in 8 bits, as transformers saves it: integers, and the largest magnitude of each row.

bitsandbytes' own product also rounds activations to 8 bits, and keeps outliers in half precision. peftfx does not.
"""

from __future__ import annotations

import torch

from peftfx.quantisation.codes import Blocks
from peftfx.quantisation.grids import bytes_by_block
from peftfx.quantisation.packed import Packed

MARKS = ("SCB",)
NAMES = frozenset({"SCB", "weight", "weight_format"})
_STEP = 7.874015718698502e-3  #: bitsandbytes' 1 / 127


def read(packed: Packed) -> Blocks:
    """Return a layer's codes.

    Raises:
        PeftfxError: the codes are laid out for a GPU, or the shapes do not fit.
    """
    weight, scales = packed.get("weight", torch.int8), packed.get("SCB", torch.float32)
    if "weight_format" in packed.tensors and int(packed.get("weight_format")) != 0:
        raise packed.wrong("its weight is laid out in tiles, not row by row")
    if weight.ndim != 2 or scales.numel() != len(weight):
        raise packed.wrong(f"the shapes do not fit: weight {list(weight.shape)}, SCB {list(scales.shape)}")
    return bytes_by_block("bitsandbytes int8", weight, weight.shape[1], lambda: scales.reshape(-1, 1) * _STEP)
