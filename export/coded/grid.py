"""Grid: how the blocks of a weight become those of ONNX Runtime's `MatMulNBits`, and the tensors that it reads.

It takes blocks of 16 to 256 columns, a power of two, and codes of 4 bits fast. Codes of more bits are the sum of two
products, of their high and their low halves: `s (q - z) = 16 s (q / 16 - z / 16) + s (q % 16 - z % 16)`, and no number
is rounded by that. It is 1.1 times the time of a float32 product where codes of 8 bits take 17 times.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked

LEAST, MOST = 16, 256  #: columns of a block
GRID_BITS = 4
MIDDLE = 8  #: the operator's zero, where none is given


@dataclass
class Grid:
    """The blocks of a weight, as the operator has them.

    Attributes:
        codes: the weight's.
        block: columns of a block of the operator.
        repeats: how many of them a block of the weight becomes.
    """

    codes: Blocks
    block: int
    repeats: int
    _last: Unpacked | None = field(default=None, repr=False)
    _waiting: set[str] = field(default_factory=set, repr=False)

    @staticmethod
    def of(codes: Blocks) -> Grid | None:
        """None where the operator has no such blocks."""
        if codes.block >= codes.columns:
            whole = min(MOST, max(LEAST, 1 << (codes.columns - 1).bit_length()))
            return Grid(codes, whole, -(-codes.columns // whole))
        block = min(MOST, codes.block & -codes.block)  # the largest power of two in it
        return Grid(codes, block, codes.block // block) if block >= LEAST else None

    @property
    def count(self) -> int:
        """How many blocks of the operator a row has."""
        return -(-self.codes.columns // self.block)

    @property
    def halves(self) -> tuple[int, ...]:
        """By how many bits the codes of each product are shifted."""
        return (0,) if self.codes.bits <= GRID_BITS else (GRID_BITS, 0)

    @property
    def centre(self) -> int:
        """How many steps are taken from codes and given back to what is least: from 0 on all have one sign.

        What two products of one sign lose in their difference is several times what one about zero loses.
        """
        codes = self.codes
        if not codes.shifted or codes.own_zeros or codes.zero:
            return 0
        return (1 << codes.bits - 1) + (MIDDLE if codes.bits > GRID_BITS else 0)

    def zero(self, shift: int) -> int | None:
        """The zero of all blocks in a product; None where each has its own."""
        zero = self.codes.zero + self.centre
        return None if self.codes.own_zeros else zero >> shift & _mask(shift, self.codes.bits)

    def wide(self, shift: int) -> bool:
        """Whether a block's own zero may be one more than fits into its bits: it is a float then."""
        return self.codes.own_zeros and self.codes.largest_zero >> shift > 15 and shift == self.halves[0]

    def blocks(self, shift: int) -> Tensor:
        """uint8 [out, blocks, block / 2] of a product, two codes in a byte."""
        codes = self._read(f"blocks{shift}").integers >> shift & 15
        padded = torch.nn.functional.pad(codes, (0, self.count * self.block - self.codes.columns))
        return (padded[:, ::2] | padded[:, 1::2] << 4).view(self.codes.rows, self.count, -1)

    def scales(self, shift: int) -> Tensor:
        """float32 [out, blocks] of a product."""
        return self._wide(self._read(f"scales{shift}").scales) * float(1 << shift)

    def zeros(self, shift: int) -> Tensor:
        """uint8 [out, blocks / 2] of a product, two in a byte; or float32 [out, blocks]."""
        rows, same = self.codes.rows, self.zero(shift)
        if same is not None:
            return torch.full((rows, -(-self.count // 2)), same | same << 4, dtype=torch.uint8)
        zeros = self._read(f"zeros{shift}").zeros
        assert zeros is not None
        own = self._wide(zeros >> shift if shift or len(self.halves) == 1 else zeros & 15)
        if self.wide(shift):
            return own.float()
        padded = torch.nn.functional.pad(own, (0, self.count % 2)).to(torch.uint8)
        return padded[:, ::2] | padded[:, 1::2] << 4

    def least(self) -> Tensor:
        """float32 [blocks of the weight, out]: what is taken away for each block's sum of inputs."""
        found = self._read("least")
        assert found.least is not None
        return (found.least - self.centre * found.scales).T.contiguous()

    def _wide(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.repeats, 1)[:, : self.count].contiguous()

    def _read(self, what: str) -> Unpacked:
        """The unpacked weight, kept until something is asked for again: what is written is written one by one."""
        if self._last is None:
            self._last, self._waiting = self.codes.unpack(), self._wanted()
        found = self._last
        self._waiting.discard(what)
        if not self._waiting:
            self._last = None
        return found

    def _wanted(self) -> set[str]:
        names = ["blocks", "scales", *(["zeros"] if self.codes.own_zeros else [])]
        return {f"{n}{s}" for n in names for s in self.halves} | ({"least"} if self.codes.shifted else set())


def _mask(shift: int, bits: int) -> int:
    """Of a zero that all blocks share: the lower half's bits where there are two."""
    return 15 if shift == 0 and bits > GRID_BITS else 31
