"""Rounding: turns a floating-point weight into codes, by a search for the best grid of each block, without data.

A block of a row is `scale * (q - zero)`. The search tries some scales near the scale at which the grid spans the
block's range. For each scale it finds the nearest integers, and then the scale with the least squared error for these
integers, `s = <x, d> / <d, d>` with `d = q - zero`. The grid with the least error is taken. llama.cpp searches in the
same way: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c (make_qx_quants)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.quantisation.codes import TABLES, Tabled

_BLOCK = 64  #: the size of bitsandbytes' blocks
_AT_ONCE = 1 << 22  #: how many elements are rounded at a time
#: The shares of a block's range that a grid may span. With few integers it helps to cut off the largest numbers.
_SPANS = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), 8: (1.0,)}


@dataclass(frozen=True)
class Rounded:
    """The rounded blocks of a weight [out, in]. The last block of a row is padded with zeros.

    Attributes:
        integers: uint8 [out, blocks, block].
        scales: [out, blocks], in the weight's dtype.
        zeros: uint8 [out, blocks]; None if all are `2^(bits - 1)`.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None

    def values(self, middle: int) -> Tensor:
        """Return the rounded numbers, float32 [out, blocks * block]. `middle` is the zero that all blocks share."""
        zeros = middle if self.zeros is None else self.zeros.float().unsqueeze(-1)
        return ((self.integers.float() - zeros) * self.scales.float().unsqueeze(-1)).flatten(1)


def round_blocks(
    weight: Tensor, bits: int, block: int, *, symmetric: bool = True, search: bool = True, signed: bool = True
) -> Rounded:
    """Round a weight [out, in] in blocks of each row.

    Args:
        weight: a weight of any floating-point dtype, which is also the dtype of the scales.
        bits: the bits of an integer, 4 or 8.
        block: how many numbers share a scale.
        symmetric: all zeros are `2^(bits - 1)`; otherwise each block has its own.
        search: whether the best grid is searched; otherwise the grid spans the block's range.
        signed: whether a scale may be negative. Then a symmetric grid also uses its one integer without a counterpart.
    """
    rows = max(1, _AT_ONCE // weight.shape[1])
    spans = _SPANS[bits] if search else (1.0,)
    parts = [_rounded(part, bits, block, spans, symmetric, search, signed) for part in weight.split(rows)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    integers, scales = torch.cat([part.integers for part in parts]), torch.cat([part.scales for part in parts])
    return Rounded(integers, scales, torch.cat(zeros) if zeros else None)


def _rounded(
    weight: Tensor, bits: int, block: int, spans: tuple[float, ...], symmetric: bool, search: bool, signed: bool
) -> Rounded:
    top, half = (1 << bits) - 1, 1 << bits - 1
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block))
    blocks = padded.unflatten(1, (-1, block)).float()
    low, high = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)

    def grids() -> Iterator[tuple[Tensor, Tensor | int]]:
        for span in spans:
            if not symmetric:
                scale = (high - low) * (span / top)
                yield scale, torch.where(scale > 0, -low * span / scale, 0.0).round_()
            elif signed:
                yield torch.where(-low > high, low, high) * (span / -half), half
            if symmetric and (search or not signed):  # a grid with equal ends on both sides
                yield torch.maximum(-low, high) * (span / (half - 1)), half

    def integers(scale: Tensor, zero: Tensor | int) -> tuple[Tensor, Tensor]:
        shift = zero if isinstance(zero, int) else zero.unsqueeze(-1)
        found = (blocks * _inverse(scale).unsqueeze(-1)).round_().add_(shift).clamp_(0, top)
        return found, found - shift

    best = _best(blocks, grids(), integers, refine=search)
    scales = best.scales.to(weight.dtype)
    zeros = None if isinstance(best.zeros, int) else best.zeros.to(torch.uint8)
    return Rounded(best.codes.to(torch.uint8), scales, zeros)


def round_table(weight: Tensor, table: str, block: int, *, search: bool = True) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [numbers] of the flat weight, and magnitudes float32 [blocks], for a bitsandbytes table."""
    numbers, order = torch.tensor(TABLES[table]).sort(stable=True)
    middles = (numbers[1:] + numbers[:-1]) / 2
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)
    codes, magnitudes = [], []
    for part in flat.split(max(1, _AT_ONCE // block)):
        blocks = part.float()
        largest = blocks.abs().amax(-1)

        def nearest(scale: Tensor, _: Tensor | int, blocks: Tensor = blocks) -> tuple[Tensor, Tensor]:
            found = torch.bucketize(blocks * _inverse(scale).unsqueeze(-1), middles)
            return found, numbers[found]

        spans = (1.0, 0.95, 0.9) if search else (1.0,)
        best = _best(blocks, ((largest * span, 0) for span in spans), nearest, refine=search)
        codes.append(order[best.codes].to(torch.uint8).view(-1))
        magnitudes.append(best.scales)
    return torch.cat(codes)[: weight.numel()], torch.cat(magnitudes)


@dataclass
class _Best:
    codes: Tensor
    scales: Tensor
    zeros: Tensor | int
    gain: Tensor


def _best(
    blocks: Tensor,
    grids: Iterator[tuple[Tensor, Tensor | int]],
    codes_on: Callable[[Tensor, Tensor | int], tuple[Tensor, Tensor]],
    *,
    refine: bool,
) -> _Best:
    """Return the grid with the least squared error, `|x|^2 - <x, d>^2 / |d|^2` at the best scale for its integers."""
    best: _Best | None = None
    for scale, zero in grids:
        codes, steps = codes_on(scale, zero)
        if not refine:
            return _Best(codes, scale, zero, scale)
        along, length = (blocks * steps).sum(-1), (steps * steps).sum(-1)
        fitted = torch.where(length > 0, along / length, 0.0)
        gain = along * fitted
        if best is None:
            best = _Best(codes, fitted, zero, gain)
            continue
        better = gain > best.gain
        best.codes = torch.where(better.unsqueeze(-1), codes, best.codes)
        best.scales, best.gain = torch.where(better, fitted, best.scales), torch.where(better, gain, best.gain)
        if isinstance(zero, Tensor) and isinstance(best.zeros, Tensor):
            best.zeros = torch.where(better, zero, best.zeros)
    assert best is not None
    return best


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1 / scale, 0.0)


def tabled(weight: Tensor, table: str = "nf4") -> Tabled:
    """Return the codes of a weight [out, in]. Only the weight is kept: codes are computed at each access.

    Each block of 64 numbers is divided by its largest magnitude, and each number becomes the nearest one of the table:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/csrc/cpu_ops.cpp (quantize_cpu). Magnitudes stay
    float32: they are not quantised themselves. nf4 gives the same codes as bitsandbytes. fp4 is not offered, because
    bitsandbytes rounds half-way values differently on different devices.
    """
    rows, columns = weight.shape
    packed, magnitudes = functools.partial(_packed, weight, table), functools.partial(_magnitudes, weight)
    return Tabled(f"bitsandbytes {table}, quantised here", rows, columns, table, _BLOCK, packed, magnitudes)


def _blocks(weight: Tensor) -> Tensor:
    """Return the flat weight as [blocks, 64]. The last block is padded with zeros."""
    flat = weight.detach().reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)


def _magnitudes(weight: Tensor) -> Tensor:
    return _blocks(weight).abs().amax(1).float()


def _packed(weight: Tensor, table: str) -> Tensor:
    found = []
    for some in _blocks(weight).split(_AT_ONCE // _BLOCK):
        values = some.float()
        largest = values.abs().amax(1, keepdim=True)
        scaled = torch.where(largest > 0, values / largest, 0.0)
        found.append(_nearest(scaled, table).to(torch.uint8).view(-1))
    codes = torch.cat(found)[: weight.numel() + weight.numel() % 2]
    return codes[::2] << 4 | codes[1::2]


def _nearest(values: Tensor, table: str) -> Tensor:
    """Return the codes of the nearest numbers; half-way values take the lower number."""
    numbers, order = torch.tensor(TABLES[table]).sort(stable=True)
    return order[torch.bucketize(values, (numbers[1:] + numbers[:-1]) / 2)]
