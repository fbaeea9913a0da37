"""LoRA's factors by name: expanded from blocks, joined with the factors of the start, stacked for a fused site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftfx.contract.broadcast import row_index
from peftfx.contract.common.dora import row_norms
from peftfx.contract.common.experts import of_parts
from peftfx.contract.method import Params
from peftfx.errors import PeftfxError, shown
from peftfx.sites.blocks import Rows
from peftfx.sites.site import EXPERTS, Site

A, B, MAGNITUDE, B_BIAS = "lora_A", "lora_B", "lora_magnitude_vector", "lora_B_bias"
A0, B0 = "lora_A0", "lora_B0"
DIAG = "lora_diag"  #: KaSA's diagonal between the factors


class DiagonalBlocks(NamedTuple):
    """BD-LoRA: the name of the block-diagonal factor, and its number of blocks, stored one below the other."""

    factor: str
    number: int

    @staticmethod
    def at(config: Mapping[str, object] | None, path: str) -> DiagonalBlocks | None:
        """Read HF PEFT's config for the layer at `path`. A pattern matches anywhere in the path.

        Raises:
            PeftfxError: the config names both factors for the layer, or neither where each layer must have one, or
                `nblocks` is not a whole number of 1 or more.
        """
        if config is None:
            return None
        patterns = {A: config.get("target_modules_bd_a"), B: config.get("target_modules_bd_b")}
        found = [factor for factor, given in patterns.items() if any(str(text) in path for text in _listed(given))]
        count = config.get("nblocks", 1)
        if len(found) > 1 or (not found and config.get("match_strict", True)):
            what = f"BD-LoRA's patterns name {'both factors' if found else 'no factor'} of this layer"
            raise PeftfxError(what, path, "one of target_modules_bd_a, target_modules_bd_b; or match_strict=False")
        if not isinstance(count, int) or count < 1:
            raise PeftfxError(f"not a number of blocks: {shown(count)}", "use_bdlora: nblocks", "1 or more")
        return DiagonalBlocks(found[0], count) if found else None

    def config(self) -> dict[str, object]:
        """Return HF PEFT's config of a layer with these blocks."""
        return {"target_modules_bd_a" if self.factor == A else "target_modules_bd_b": [""], "nblocks": self.number}

    def shape(self, rows: int, columns: int, where: str) -> tuple[int, int]:
        """Return the shape of the stored blocks of a factor of `rows` x `columns`.

        Raises:
            PeftfxError: the number of blocks does not divide the factor's shape.
        """
        if rows % self.number or columns % self.number:
            what = f"{self.number} blocks do not divide a factor of {rows} x {columns}"
            raise PeftfxError(what, where, "a divisor of the rank and of the layer's size as nblocks")
        return rows, columns // self.number

    def set_out(self, blocks: Tensor) -> Tensor:
        """Return the whole factor, with `blocks` on its diagonal and zeros elsewhere."""
        each = blocks.unflatten(0, (self.number, -1))  # [blocks, rows, columns]
        eye = torch.eye(self.number, dtype=blocks.dtype, device=blocks.device)
        return (each[:, :, None] * eye[:, None, :, None]).flatten(2).flatten(0, 1)


def _listed(given: object) -> Sequence[object]:
    return given if isinstance(given, list | tuple) else ()


def set_out(p: Params, blocks: DiagonalBlocks | None) -> Params:
    """Return the parameters of a plain LoRA: blocks expanded, and KaSA's diagonal multiplied into A."""
    if blocks is not None:
        p = {**p, blocks.factor: blocks.set_out(p[blocks.factor])}
    if DIAG in p:
        p = {name: t * p[DIAG][:, None] if name == A else t for name, t in p.items() if name != DIAG}
    return p


def dropped_part(weight: Tensor, r: int, where: str) -> tuple[Tensor, Tensor]:
    """Return KaSA's factors of the part of a weight with the `r` smallest singular values, [r, in] and [out, r].

    Raises:
        PeftfxError: the weight has no further singular values.
    """
    if r >= min(weight.shape):
        what = f"KaSA leaves out {r} singular values, and a weight of {list(weight.shape)} has {min(weight.shape)}"
        raise PeftfxError(what, where, f"r={min(weight.shape) - 1} or less")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return vh[-r:].contiguous(), u[:, -r:] * s[-r:]


def joined(p: Params) -> dict[str, Tensor]:
    """Return factors whose product is `B A - B0 A0`."""
    both = {A: torch.cat([p[A], p[A0]]), B: torch.cat([p[B], -p[B0]], 1)}
    return {name: both.get(name, t) for name, t in p.items() if name not in (A0, B0)}


def stacked_factors(site: Site, weight: Tensor, parts: Mapping[Rows, Params]) -> dict[str, Tensor]:
    """Return one LoRA of a fused site that equals the LoRAs of its parts: A stacked, B block-structured.

    Args:
        weight: the whole site's weight, [out, in, *kernel]. In DoRA, rows without a part get their magnitudes from it.
        parts: the parameters of each part, by the part's rows; all parts have the same rank.
    """
    if site.kind == EXPERTS:
        factors = [(rows, q[A], q[B]) for rows, q in parts.items()]
        return dict(zip((A, B), of_parts(site.shape[0], site.rows, factors), strict=True))
    first = next(iter(parts.values()))
    r = first[A].shape[0]
    p = {A: torch.cat([q[A] for q in parts.values()]), B: first[B].new_zeros(weight.shape[0], r * len(parts))}
    if B_BIAS in first:
        p[B_BIAS] = first[B_BIAS].new_zeros(weight.shape[0])
    if MAGNITUDE in first:
        p[MAGNITUDE] = row_norms(site, weight).clone()
    for i, (rows, q) in enumerate(parts.items()):
        index = row_index(rows)
        p[B][index, i * r : (i + 1) * r] = q[B]
        for name in {B_BIAS, MAGNITUDE} & p.keys():
            p[name][index] = q[name].to(p[name].dtype)
    return p
