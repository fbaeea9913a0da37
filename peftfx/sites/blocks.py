"""Rows of a fused weight: as ranges, as blocks that repeat, and a part of a site as a site of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.sites.site import Part, Site

Rows = tuple[tuple[int, int], ...]
"""Half-open ranges of the output dimension."""


@dataclass(frozen=True)
class Block:
    """Rows of a fused weight that repeat: in each of `count` blocks of `stride` rows, `length` rows from `start` on."""

    count: int
    stride: int
    start: int
    length: int

    @staticmethod
    def of(part: Part, out: int) -> Block:
        """Return the rows of `part` as a block, in a weight of `out` rows."""
        (first, end), count = part.rows[0], len(part.rows)
        block = Block(count, out // count, first, end - first)
        expected = tuple((first + i * block.stride, end + i * block.stride) for i in range(count))
        if part.rows != expected or out % count:
            raise PeftfxError(
                "the rows of this part are spread irregularly in the weight: it cannot be adapted by itself",
                part.role,
                "target the whole site",
            )
        return block

    def take(self, t: Tensor, dim: int) -> Tensor:
        """Return these rows of `t` along `dim`."""
        dim %= t.ndim
        return (
            t.unflatten(dim, (self.count, self.stride)).narrow(dim + 1, self.start, self.length).flatten(dim, dim + 1)
        )

    def put(self, t: Tensor, rows: Tensor, dim: int) -> Tensor:
        """Return a copy of `t` in which `rows` replace these rows along `dim`."""
        dim %= t.ndim
        blocks = t.unflatten(dim, (self.count, self.stride))
        new, after = rows.unflatten(dim, (self.count, self.length)), self.start + self.length
        pieces = [blocks.narrow(dim + 1, 0, self.start), new, blocks.narrow(dim + 1, after, self.stride - after)]
        return torch.cat([p for p in pieces if p.shape[dim + 1] != 0], dim + 1).flatten(dim, dim + 1)


def part_site(site: Site, part: Part, block: Block) -> Site:
    """Return a part of a fused site as a site of its own."""
    shape = list(site.shape)
    shape[site.rows_axis + site.transposed] = block.count * block.length
    return dataclasses.replace(site, role=part.role, shape=tuple(shape), parts=())


def turned(weight: Tensor, transposed: bool) -> Tensor:
    """Convert a weight between its stored layout and [out, in, ...] or [experts, out, in], in both directions."""
    if not transposed:
        return weight
    return weight.T if weight.ndim == 2 else weight.transpose(-2, -1)
