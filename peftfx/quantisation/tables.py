"""tabled: a weight in floating point as bitsandbytes' `load_in_4bit` would have it, code by code."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peftfx.quantisation.codes import TABLES, Tabled

BLOCK = 64  #: bitsandbytes' own
_AT_ONCE = 1 << 16  #: blocks that are rounded at a time


def tabled(weight: Tensor, table: str = "nf4") -> Tabled:
    """The codes of a weight [out, in], computed whenever they are asked for: the weight itself is what is kept.

    Each block of 64 numbers is divided by its largest magnitude, and each number becomes the nearest one of the table:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/csrc/cpu_ops.cpp (quantize_cpu). Magnitudes stay
    float32: they are not quantised themselves. Of nf4 the codes are bitsandbytes' own; fp4, whose numbers half way
    between two go one way or the other on its several devices, is not offered.
    """
    rows, columns = weight.shape
    packed, magnitudes = functools.partial(_packed, weight, table), functools.partial(_magnitudes, weight)
    return Tabled(f"bitsandbytes {table}, quantised here", rows, columns, table, BLOCK, packed, magnitudes)


def _blocks(weight: Tensor) -> Tensor:
    """[blocks, 64], the last one filled up by zeros."""
    flat = weight.detach().reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _magnitudes(weight: Tensor) -> Tensor:
    return _blocks(weight).abs().amax(1).float()


def _packed(weight: Tensor, table: str) -> Tensor:
    found = []
    for some in _blocks(weight).split(_AT_ONCE):
        values = some.float()
        largest = values.abs().amax(1, keepdim=True)
        scaled = torch.where(largest > 0, values / largest, 0.0)
        found.append(_nearest(scaled, table).to(torch.uint8).view(-1))
    codes = torch.cat(found)[: weight.numel() + weight.numel() % 2]
    return codes[::2] << 4 | codes[1::2]


def _nearest(values: Tensor, table: str) -> Tensor:
    """The codes of the nearest numbers; half way is the lower one."""
    numbers, order = torch.tensor(TABLES[table]).sort(stable=True)
    return order[torch.bucketize(values, (numbers[1:] + numbers[:-1]) / 2)]
