"""Codes: a quantised linear weight [out, in] in its stored form, and the float32 matrix that it stands for.

Nothing is unpacked until its values are read: a weight holds the memory-mapped tensors of its file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: The sixteen numbers of bitsandbytes' types, which are multiplied by the largest magnitude of a block.
#: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (get_4bit_type)
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25),
        *(-0.0, -0.005208333333333333, -0.6666666666666666, -1.0, -0.3333333333333333, -0.5),
        *(-0.16666666666666666, -0.25),
    ),
}


_AT_ONCE = 1 << 20  #: how many bytes, of two codes each, are looked up at a time


@dataclass(frozen=True)
class Codes(ABC):
    """A quantised weight.

    Attributes:
        format: the format's name, for users.
        rows, columns: the weight's shape as a matrix [out, in].
    """

    format: str
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, [out, in]."""
        return self.rows, self.columns

    @abstractmethod
    def dequantise(self) -> Tensor:
        """Return the weight, float32 [out, in], computed in float32."""


@dataclass(frozen=True)
class Unpacked:
    """The numbers of a weight of blocks, with one code in each byte.

    Attributes:
        integers: uint8 [out, in], with columns in an order in which blocks are contiguous.
        scales: float32 [out, blocks].
        zeros: int16 [out, blocks], from 0 to 2^bits, if each block has its own zero.
        least: float32 [out, blocks], subtracted after scaling.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    least: Tensor | None = None


@dataclass(frozen=True)
class Blocks(Codes):
    """Integers on a grid for each block of a row: `scale * (q - zero) - least`.

    Attributes:
        bits: the bits of a code, 1 to 8.
        block: how many adjacent columns share a scale; the last block may be shorter.
        unpack: a function that reads and unpacks the blocks.
        zero: the zero of all blocks, if blocks have no zeros of their own.
        own_zeros: whether each block has its own zero.
        largest_zero: the largest of the blocks' own zeros.
        shifted: whether `least` is subtracted after scaling.
        order: int64 [in], the weight's column of each stored column; None if the order is the same.
    """

    bits: int
    block: int
    unpack: Callable[[], Unpacked] = field(repr=False, compare=False)
    zero: int = 0
    own_zeros: bool = False
    largest_zero: int = 0
    shifted: bool = False
    order: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def count(self) -> int:
        """The number of blocks in a row."""
        return -(-self.columns // self.block)

    def dequantise(self) -> Tensor:
        found = self.unpack()
        values = found.integers.float()
        for blocks, at in _by_block(values, self.block):
            blocks -= self.zero if found.zeros is None else found.zeros[:, at, None].float()
            blocks *= found.scales[:, at, None]
            if found.least is not None:
                blocks -= found.least[:, at, None]
        return values if self.order is None else values.index_select(1, torch.argsort(self.order))


@dataclass(frozen=True)
class Tabled(Codes):
    """bitsandbytes' 4-bit floats: numbers of a table times the largest magnitude of each block of the flat weight.

    Attributes:
        table: `nf4` or `fp4`.
        block: how many numbers share a magnitude, across rows too.
        packed: a function that reads uint8 [numbers / 2], two codes in a byte, the first in the high half.
        magnitudes: a function that reads float32 [blocks].
    """

    table: str
    block: int
    packed: Callable[[], Tensor] = field(repr=False, compare=False)
    magnitudes: Callable[[], Tensor] = field(repr=False, compare=False)

    def dequantise(self) -> Tensor:
        count = self.rows * self.columns
        table = torch.tensor(TABLES[self.table])
        pairs = torch.cartesian_prod(table, table).view(torch.int64).view(-1)  # both numbers of a byte, as one value
        packed, largest = self.packed(), self.magnitudes()
        values = torch.empty(len(largest) * self.block)
        wide = values.view(torch.int64)
        for start in range(0, len(packed), _AT_ONCE):
            some = packed[start : start + _AT_ONCE]
            wide[start : start + len(some)] = pairs.index_select(0, some.int())
        return values.view(-1, self.block).mul_(largest.unsqueeze(1)).view(-1)[:count].view(self.shape)


@dataclass(frozen=True)
class Floats8(Codes):
    """8-bit floats, with a scale for each row or for each block of a row.

    Attributes:
        values: float8_e4m3fn [out, in].
        scales: a function that reads float32 [out, blocks].
        block: how many columns share a scale; `columns` means all.
    """

    block: int
    values: Tensor = field(repr=False, compare=False)
    scales: Callable[[], Tensor] = field(repr=False, compare=False)

    def dequantise(self) -> Tensor:
        values, scales = self.values.float(), self.scales()
        for blocks, at in _by_block(values, self.block):
            blocks *= scales[:, at, None]
        return values


def _by_block(values: Tensor, block: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield views [out, blocks, columns] of a matrix with the blocks' slice: whole blocks, then a shorter last one."""
    whole = values.shape[1] // block
    cut = whole * block
    if whole:
        yield values[:, :cut].unflatten(1, (whole, block)), slice(whole)
    if cut < values.shape[1]:
        yield values[:, cut:].unsqueeze(1), slice(whole, whole + 1)
