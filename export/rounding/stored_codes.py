"""The codes of an export's rounded weights, read from its files: which numbers they stand for, and how near these are.

The numbers of a block are as near to their weight as those on the grid that spans the block, or nearer: the search for
a grid starts there (`peftfx.quantisation.rounding`). So codes are held to their weight without the search, which takes
many times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from peftfx.export.coded.rounded import rounded_rows
from peftfx.export.coded.stacks import number_in, stack_of
from peftfx.export.metadata import SOURCE
from peftfx.export.verification.comparison import VerificationError
from peftfx.export_options.quantize import BITS, Scheme, parse_schemes
from peftfx.graph.recipe import Get
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.codes import Codes, Tabled
from peftfx.quantisation.rounding import Rounded, round_table

_NUMBERS = 1 << 20  #: how many numbers of a weight are compared at a time
_WORSE = 1.1  #: how many times the squared error of a block may be that of the grid which spans it
_SLACK = 4e-6  #: of a block's squared numbers: what sums in float32 lose
StoredParts = dict[str, Callable[[], Tensor]]
"""Functions that read the tensors of a rounded weight, by what each is."""


@dataclass(frozen=True)
class _StoredBlocks(Codes):
    """Blocks of integers, as `MatMulNBits` reads them.

    Attributes:
        scheme: how the weight is rounded.
        parts: functions that read the blocks, the scales and, unless all are `2^(bits - 1)`, the zeros.
    """

    scheme: Scheme
    parts: StoredParts = field(repr=False, compare=False)

    def dequantise(self) -> Tensor:
        bits, zeros = self.scheme.bits, None
        scales = self.parts["scales"]().view(self.rows, -1)
        integers = _integers(self.parts["blocks"](), bits).view(self.rows, scales.shape[1], -1)
        if "zeros" in self.parts:
            zeros = _integers(self.parts["zeros"]().view(self.rows, -1), bits)[:, : scales.shape[1]]
        return Rounded(integers, scales, zeros).values(self.scheme.middle)[:, : self.columns]


def _integers(packed: Tensor, bits: int) -> Tensor:
    """Return integers of which two of 4 bits are in a byte, along the last axis."""
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


@dataclass(frozen=True)
class StoredWeight:
    """A rounded weight in an export's files.

    Attributes:
        source: the tensor of the graph that it was rounded from; empty for a constant without a name.
        number: its place in that tensor, if that is a stack of matrices.
        scheme: how it was rounded.
        parts: reads its codes.
    """

    source: str
    number: int | None
    scheme: Scheme
    parts: StoredParts = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The tensor's name, without the holder that it is in."""
        own = self.source.partition(".")[2]
        return own if self.number is None else f"{own}, matrix {self.number},"

    def own(self, get: Get) -> Tensor:
        """Return the weight that was rounded, in float32, as `get` reads it."""
        whole = get(self.source).detach()
        return (whole if self.number is None else whole[self.number]).float()

    def as_read(self, own: Tensor, where: str) -> Coded:
        """Return the tensor that stands for this weight, in the layout in which the graph has it (`own`).

        Raises:
            VerificationError: the codes stand for another weight, or are further from it than rounding leaves them.
        """
        first, second = own.shape
        turned = Coded(self._codes(second, first), views=(lambda values: values.T,))
        fits = [made for made in (Coded(self._codes(first, second)), turned) if self._fits(made)]
        far = [float((own - made.source).norm()) for made in fits]
        if not min(far) <= float(own.norm()):  # or NaN
            raise VerificationError(f"the codes of {self.name} stand for another weight", where, "report this model")
        made = fits[far.index(min(far))]
        count = 0 if self.scheme.gptq else self._count_far(own.T if made.views else own, made.codes.dequantise())
        if count:
            what = f"{count:,} blocks of {self.name} are further from the weight than rounding leaves them"
            raise VerificationError(what, where, "report this model")
        return made

    def _codes(self, rows: int, columns: int) -> Codes:
        scheme, parts = self.scheme, self.parts
        if scheme.kind in BITS:
            return _StoredBlocks(str(scheme), rows, columns, scheme, parts)
        packed, magnitudes = (lambda what=what: parts[what]().flatten() for what in ("codes", "magnitudes"))
        return Tabled(str(scheme), rows, columns, scheme.kind, scheme.block, packed, magnitudes)

    def _fits(self, made: Coded) -> bool:
        """Return whether blocks of integers have as many rows as a weight [out, in]. A table's codes have no rows."""
        return "blocks" not in self.parts or len(self.parts["blocks"]()) == made.codes.rows

    def _count_far(self, weight: Tensor, stored: Tensor) -> int:
        """Count the blocks of rows of a weight [out, in] whose stored numbers are too far from it."""
        block, dtype = self.scheme.block, self.parts["scales"]().dtype if "scales" in self.parts else torch.float32
        slack = _SLACK + torch.finfo(dtype).eps ** 2
        rows = block * max(1, _NUMBERS // (block * weight.shape[1]))  # so that a table's blocks end where rows do
        count = 0
        for own, found in zip(weight.split(rows), stored.split(rows), strict=True):
            plain = self._plainly(own.to(dtype))
            far, most, size = (self._in_blocks(t) for t in (own - found, own - plain, own))
            count += int((~(far <= _WORSE * most + slack * size)).sum())
        return count

    def _plainly(self, weight: Tensor) -> Tensor:
        """Return the numbers that a weight has on the grids that span its blocks."""
        scheme = Scheme(self.scheme.kind, self.scheme.block, self.scheme.symmetric, search=False)
        if scheme.kind in BITS:
            return rounded_rows(weight, scheme)
        codes, magnitudes = round_table(weight, scheme.kind, scheme.block, search=False)
        pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        packed = pairs[::2] << 4 | pairs[1::2]
        rows, columns = weight.shape
        made = Tabled("", rows, columns, scheme.kind, scheme.block, lambda: packed, lambda: magnitudes)
        return made.dequantise()

    def _in_blocks(self, values: Tensor) -> Tensor:
        """Return the sums of squares of the blocks: of each row, or of a table's flat weight."""
        rows = values if self.scheme.kind in BITS else values.reshape(1, -1)
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % self.scheme.block))
        return padded.unflatten(1, (-1, self.scheme.block)).square().sum(-1)


def rounded_weights(written: ir.Model, program: ir.Model) -> Iterator[StoredWeight]:
    """Yield the rounded weights of a model, whose codes are read from its files when they are asked for."""
    found: dict[tuple[object, str], StoredParts] = {}
    for name, value in program.graph.initializers.items():
        made = value.meta.get(SOURCE)
        if isinstance(made, tuple) and isinstance(made[0], tuple):  # codes of a quantised base have another source
            (source, _, text), what = made
            found.setdefault((source, text), {})[what] = _read(written.graph.initializers[name])
    for (source, text), parts in found.items():
        (scheme,) = parse_schemes(text)
        named = isinstance(source, str)
        yield StoredWeight(str(stack_of(source)) if named else "", number_in(source), scheme, parts)


def _read(value: ir.Value) -> Callable[[], Tensor]:
    stored = value.const_value
    assert stored is not None
    return lambda: torch.tensor(stored.numpy())  # a copy: what is mapped cannot be written
