"""torchao in safetensors, as transformers saves it: integers in bytes, with one grid for each row or group.

The file's metadata says which of torchao's tensors a layer is. Tensors packed for a kernel (int4) are not read.

https://github.com/pytorch/ao/blob/main/torchao/prototype/safetensors/safetensors_support.py
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked
from peftfx.quantisation.packed import Packed

MARKS = ("_weight_qdata",)
NAMES = frozenset({*MARKS, "_weight_scale", "_weight_zero_point"})
LAYER = "layer"  #: the key, in a layer's config, of the layer's metadata in its file


def read(packed: Packed) -> Blocks:
    """Return a layer's codes. Settings for activations are ignored: activations are not rounded.

    Raises:
        PeftfxError: the layer is another of torchao's tensors, or the shapes do not fit.
    """
    said = packed.config.get(LAYER)
    kind = str(said.get("_type")) if isinstance(said, dict) else "of an unnamed type"
    bits = {"Int8Tensor": 8, "IntxUnpackedToInt8Tensor": _bits(said)}.get(kind, 0)
    if not bits:
        raise packed.wrong(f"torchao's tensor is {kind} (peftfx reads Int8Tensor and IntxUnpackedToInt8Tensor)")
    weight = packed.get("_weight_qdata", torch.int8)
    scale = packed.get("_weight_scale", torch.float32, torch.float16, torch.bfloat16)
    if weight.ndim != 2 or scale.ndim != 2 or not scale.shape[1] or weight.shape[1] % scale.shape[1]:
        raise packed.wrong(
            f"the shapes do not fit: _weight_qdata {list(weight.shape)}, _weight_scale {list(scale.shape)}"
        )
    rows, columns = weight.shape
    packed.check("_weight_scale", (rows, scale.shape[1]))
    zeros = packed.tensors.get("_weight_zero_point")
    if zeros is not None:
        packed.check("_weight_zero_point", (rows, scale.shape[1]))
        zeros = zeros if bool(zeros.any()) else None
    unpack = functools.partial(_unpack, 1 << bits - 1, weight, scale, zeros)
    own = zeros is not None
    return Blocks(f"torchao int{bits}", rows, columns, bits, columns // scale.shape[1], unpack, 1 << bits - 1, own)


def _bits(said: object) -> int:
    """Return the bits of `target_dtype` in a layer's metadata, or 0 if it has none."""
    match = re.search(r"torch\.dtype['\"].*?['\"]int([1-8])['\"]", str(_target(said)))
    return int(match[1]) if match else 0


def _target(said: object) -> object:
    data = said.get("_data") if isinstance(said, dict) else None
    return data.get("target_dtype") if isinstance(data, dict) else None


def _unpack(middle: int, weight: Tensor, scale: Tensor, zeros: Tensor | None) -> Unpacked:
    codes = (weight.to(torch.int16) + middle).to(torch.uint8)
    return Unpacked(codes, scale.float(), None if zeros is None else zeros.to(torch.int16) + middle)
