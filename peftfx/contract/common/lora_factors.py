"""LoRA's factors by their names: joined with those of the start, and stacked for a fused site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftfx.contract.broadcast import row_index
from peftfx.contract.common.dora import row_norms
from peftfx.contract.common.experts import of_parts
from peftfx.contract.method import Params
from peftfx.sites.blocks import Rows
from peftfx.sites.site import EXPERTS, Site

A, B, MAGNITUDE, B_BIAS = "lora_A", "lora_B", "lora_magnitude_vector", "lora_B_bias"
A0, B0 = "lora_A0", "lora_B0"


def joined(p: Params) -> dict[str, Tensor]:
    """Factors whose product is `B A - B0 A0`."""
    both = {A: torch.cat([p[A], p[A0]]), B: torch.cat([p[B], -p[B0]], 1)}
    return {name: both.get(name, t) for name, t in p.items() if name not in (A0, B0)}


def stacked_factors(site: Site, weight: Tensor, parts: Mapping[Rows, Params]) -> dict[str, Tensor]:
    """One LoRA of a fused site that does what those of its parts do: A stacked, B block-structured.

    Args:
        weight: the whole site's, [out, in, *kernel]; where there are magnitudes, those of rows without a part are its.
        parts: the parameters of each part by its rows, all of one rank.
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
