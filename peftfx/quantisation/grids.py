"""Quantisation grids that several formats share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from peftfx.quantisation.codes import Blocks, Unpacked

_MIDDLE = 128


def bytes_by_block(
    name: str, weight: Tensor, block: int, scales: Callable[[], Tensor], zeros: Callable[[], Tensor] | None = None
) -> Blocks:
    """Return blocks of int8 codes [out, in] with float32 scales [out, blocks]. A block's zero is int8 too."""
    unpack = functools.partial(_bytes, weight, scales, zeros)
    rows, columns = weight.shape
    return Blocks(name, rows, columns, 8, block, unpack, _MIDDLE, own_zeros=zeros is not None)


def _bytes(weight: Tensor, scales: Callable[[], Tensor], zeros: Callable[[], Tensor] | None) -> Unpacked:
    codes = (weight.to(torch.int16) + _MIDDLE).to(torch.uint8)
    return Unpacked(codes, scales(), None if zeros is None else zeros().to(torch.int16) + _MIDDLE)


def in_order(groups: Tensor, block: int, columns: int) -> Tensor | None:
    """Return the column order [in] in which blocks are contiguous, given each column's group; None if it is already.

    Raises:
        ValueError: the groups do not have `block` columns each.
    """
    counted = torch.arange(columns) // block
    groups = groups.long()
    if torch.equal(groups, counted):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], counted):
        raise ValueError(f"g_idx does not divide the columns into groups of {block}")
    return order
