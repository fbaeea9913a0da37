"""LoRA's factors by name: new factors, factors joined with the start's, and factors stacked for a fused site."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, row_index
from peftfx.contract.common.experts import of_parts
from peftfx.contract.common.lora.dora import MAGNITUDE, row_norms
from peftfx.contract.common.low_rank import A, B
from peftfx.contract.method import Params
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.site import EXPERTS, Site

B_BIAS = "lora_B_bias"
A0, B0 = "lora_A0", "lora_B0"  #: factors of the part that is subtracted from the update, if it starts from the weight


def zero_factors(site: Site, weight: Tensor, r: int) -> dict[str, Tensor]:
    """Return A and B of zeros, in HF PEFT's shapes: [r, in, *kernel] and [out, r], or those of all experts.

    Raises:
        PeftfxError: the number of a conv's groups does not divide the rank.
    """
    new = functools.partial(torch.zeros, dtype=adapter_dtype(weight.dtype), device=weight.device)
    if site.kind == EXPERTS:
        count, out, inner = weight.shape
        return {A: new(count * r, inner), B: new(out, r * count)}
    if site.kind == "embedding":
        return {A: new(r, weight.shape[0]), B: new(weight.shape[1], r)}
    if site.groups > 1 and r % site.groups:
        hint = f"take a multiple of {site.groups}, in rank_pattern for this module alone"
        raise PeftfxError(f"a conv of {site.groups} groups cannot have rank {r}", site.path, hint)
    out, inner, *kernel = weight.shape
    return {A: new(r, inner * site.groups, *kernel), B: new(out, r // site.groups, *(1 for _ in kernel))}


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
