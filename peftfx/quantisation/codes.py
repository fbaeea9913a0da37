"""Codes: a quantised linear weight [out, in] as it is stored, and the one matrix in float32 that it stands for.

Nothing is unpacked until it is asked for: a weight holds the tensors of its file, which are memory-mapped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: The sixteen numbers of bitsandbytes' types, times the largest magnitude of a block.
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


_AT_ONCE = 1 << 20  #: bytes of two codes that are looked up at a time


@dataclass(frozen=True)
class Codes(ABC):
    """A quantised weight.

    Attributes:
        format: what it is, in words.
        rows, columns: its shape as a matrix [out, in].
    """

    format: str
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.rows, self.columns

    @abstractmethod
    def dequantise(self) -> Tensor:
        """The weight, float32 [out, in], computed in float32."""


@dataclass(frozen=True)
class Unpacked:
    """What a weight of blocks is made of, one number in a byte.

    Attributes:
        integers: uint8 [out, in], in the order in which blocks are contiguous.
        scales: float32 [out, blocks].
        zeros: int16 [out, blocks], from 0 to 2^bits, where each block has its own.
        least: float32 [out, blocks], what is taken away after scaling.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    least: Tensor | None = None


@dataclass(frozen=True)
class Blocks(Codes):
    """Integers on a grid for each block of a row: `scale * (q - zero) - least`.

    Attributes:
        bits: of a code, 1 to 8.
        block: how many columns in a row share a scale; a last block may be shorter.
        unpack: reads and unpacks them.
        zero: of all blocks, where they have none of their own.
        own_zeros: whether each block has its own zero.
        largest_zero: there is, of their own.
        shifted: whether something is taken away after scaling.
        order: int64 [in], where the columns that the blocks hold come from, where that is not their own order.
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
        """How many blocks a row has."""
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
        packed: reads uint8 [numbers / 2], two codes in a byte, the first in the high half.
        magnitudes: reads float32 [blocks].
    """

    table: str
    block: int
    packed: Callable[[], Tensor] = field(repr=False, compare=False)
    magnitudes: Callable[[], Tensor] = field(repr=False, compare=False)

    def dequantise(self) -> Tensor:
        count = self.rows * self.columns
        table = torch.tensor(TABLES[self.table])
        pairs = torch.cartesian_prod(table, table).view(torch.int64).view(-1)  # of a byte, the two numbers as one
        packed, largest = self.packed(), self.magnitudes()
        values = torch.empty(len(largest) * self.block)
        wide = values.view(torch.int64)
        for start in range(0, len(packed), _AT_ONCE):
            some = packed[start : start + _AT_ONCE]
            wide[start : start + len(some)] = pairs.index_select(0, some.int())
        return values.view(-1, self.block).mul_(largest.unsqueeze(1)).view(-1)[:count].view(self.shape)


@dataclass(frozen=True)
class Floats8(Codes):
    """8-bit floats and a scale for each row, or for each block of a row.

    Attributes:
        values: float8_e4m3fn [out, in].
        scales: reads float32 [out, blocks].
        block: how many columns share a scale; all of them where it is `columns`.
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
    """Views [out, blocks, columns] of a matrix, and which blocks they are: the whole ones, then a shorter last one."""
    whole = values.shape[1] // block
    cut = whole * block
    if whole:
        yield values[:, :cut].unflatten(1, (whole, block)), slice(whole)
    if cut < values.shape[1]:
        yield values[:, cut:].unsqueeze(1), slice(whole, whole + 1)
