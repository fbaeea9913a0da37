"""Weights in memory of a quantiser's own class: torchao's, most of which name their parts alike, and others.

https://github.com/pytorch/ao/tree/main/torchao/quantization/quantize_/workflows
https://github.com/huggingface/optimum-quanto/tree/main/optimum/quanto/tensor
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftfx.graph.lazy_weights import Stored
from peftfx.quantisation.codes import Blocks, Codes, Floats8, Unpacked
from peftfx.quantisation.fp8 import E4M3
from peftfx.quantisation.grids import bytes_by_block

_MIDDLE = 8  #: the middle of the codes of 4 bits


def is_of_quantiser(weight: object) -> bool:
    """Return whether a tensor is of torchao's classes, or of another class that wraps codes and dequantises them."""
    if not isinstance(weight, Tensor) or isinstance(weight, Stored):
        return False
    own = type(weight).dequantize is not Tensor.dequantize  # type: ignore[comparison-overlap]
    return _is_torchao(weight) or (own and is_traceable_wrapper_subclass(weight))


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def read(weight: Tensor) -> Codes:
    """Return a weight's codes: torchao's int8 and e4m3 unchanged, and all others as their class dequantises them."""
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    block = tuple(getattr(weight, "block_size", ()) or ())
    name = f"torchao {type(weight).__name__}" if _is_torchao(weight) else type(weight).__name__
    rows, columns = weight.shape
    by_row = isinstance(scale, Tensor) and scale.ndim == 2 and block[:1] == (1,)
    if not by_row or not isinstance(codes, Tensor) or codes.shape != weight.shape or len(block) != 2:
        return Other(name, rows, columns, weight)
    assert isinstance(scale, Tensor)
    if getattr(weight, "act_pre_scale", None) is not None:
        return Other(name, rows, columns, weight)
    if codes.dtype == E4M3:
        return Floats8(name, rows, columns, int(block[1]), codes, scale.float)
    if codes.dtype != torch.int8:
        return Other(name, rows, columns, weight)
    zero = getattr(weight, "zero_point", None)
    if getattr(weight, "target_dtype", None) is getattr(torch, "int4", 0) and (zero is None or not zero.any()):
        return Blocks(name, rows, columns, 4, int(block[1]), functools.partial(_unpack, codes, scale), _MIDDLE)
    zeros = functools.partial(torch.Tensor.to, zero, torch.int8) if zero is not None and zero.any() else None
    return bytes_by_block(name, codes, int(block[1]), scale.float, zeros)


def _unpack(codes: Tensor, scale: Tensor) -> Unpacked:
    return Unpacked((codes + _MIDDLE).to(torch.uint8), scale.float())


@dataclass(frozen=True)
class Other(Codes):
    """A weight whose layout only its package knows.

    Attributes:
        weight: the tensor, of the package's class.
    """

    weight: Tensor = field(repr=False, compare=False)

    def dequantise(self) -> Tensor:
        return self.weight.dequantize().float()
