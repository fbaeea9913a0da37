"""Convert the blocks of a quantised weight to the blocks and tensors of ONNX Runtime's `MatMulNBits`.

The operator takes blocks of 16 to 256 columns, a power of two. It is fast only for codes of 4 bits. Codes of more bits
are therefore computed as the sum of two products, one with their high halves and one with their low halves:

    s (q - z) = 16 s (q / 16 - z / 16) + s (q % 16 - z % 16)

This rounds no number. Two such products take 1.1 times as long as a float32 product. One product with codes of 8 bits
takes 17 times as long.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked

LEAST, MOST = 16, 256  #: the fewest and the most columns of a block
GRID_BITS = 4
MIDDLE = 8  #: the zero that the operator uses if none is given


@dataclass
class Grid:
    """The blocks of a weight in the form that the operator takes.

    Attributes:
        codes: the codes of the weight.
        block: the number of columns of an operator's block.
        repeats: the number of operator's blocks that one block of the weight becomes.
    """

    codes: Blocks
    block: int
    repeats: int
    _last: Unpacked | None = field(default=None, repr=False)
    _waiting: set[str] = field(default_factory=set, repr=False)

    @staticmethod
    def of(codes: Blocks) -> Grid | None:
        """Make the grid for a weight's codes. Return None if the operator has no such blocks."""
        if codes.block >= codes.columns:
            whole = min(MOST, max(LEAST, 1 << (codes.columns - 1).bit_length()))
            return Grid(codes, whole, -(-codes.columns // whole))
        block = min(MOST, codes.block & -codes.block)  # the largest power of two in it
        return Grid(codes, block, codes.block // block) if block >= LEAST else None

    @property
    def count(self) -> int:
        """The number of operator's blocks in a row."""
        return -(-self.codes.columns // self.block)

    @property
    def halves(self) -> tuple[int, ...]:
        """The number of bits by which the codes are shifted right, for each product."""
        return (0,) if self.codes.bits <= GRID_BITS else (GRID_BITS, 0)

    @property
    def centre(self) -> int:
        """The number of steps subtracted from codes so that they lie around zero. The least values add them back.

        If all codes have one sign, the rounding errors of two large sums that nearly cancel are several times larger
        than with codes around zero.
        """
        codes = self.codes
        if not codes.shifted or codes.own_zeros or codes.zero:
            return 0
        return (1 << codes.bits - 1) + (MIDDLE if codes.bits > GRID_BITS else 0)

    def zero(self, shift: int) -> int | None:
        """Return the zero that all blocks share in the product of this `shift`; None if each block has its own."""
        zero = self.codes.zero + self.centre
        return None if self.codes.own_zeros else zero >> shift & _mask(shift, self.codes.bits)

    def wide(self, shift: int) -> bool:
        """Say whether a block's own zero may be one too large for its bits. Such zeros are written as floats."""
        return self.codes.own_zeros and self.codes.largest_zero >> shift > 15 and shift == self.halves[0]

    def blocks(self, shift: int) -> Tensor:
        """Return the codes for the product of this `shift`: uint8 [out, blocks, block / 2], two codes in a byte."""
        codes = self._read(f"blocks{shift}").integers >> shift & 15
        padded = torch.nn.functional.pad(codes, (0, self.count * self.block - self.codes.columns))
        return (padded[:, ::2] | padded[:, 1::2] << 4).view(self.codes.rows, self.count, -1)

    def scales(self, shift: int) -> Tensor:
        """Return the scales for the product of this `shift`: float32 [out, blocks]."""
        return self._wide(self._read(f"scales{shift}").scales) * float(1 << shift)

    def zeros(self, shift: int) -> Tensor:
        """Return the zeros of a product: uint8 [out, blocks / 2], two in a byte, or float32 [out, blocks]."""
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
        """Return the least values, which are subtracted times each block's sum of inputs: float32 [blocks, out]."""
        found = self._read("least")
        assert found.least is not None
        return (found.least - self.centre * found.scales).T.contiguous()

    def _wide(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.repeats, 1)[:, : self.count].contiguous()

    def _read(self, what: str) -> Unpacked:
        """Return the unpacked weight. It is kept until each of its tensors has been read once."""
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
    """Return the bit mask of a zero that all blocks share: 4 bits for the lower half of two, else 5 bits."""
    return 15 if shift == 0 and bits > GRID_BITS else 31
