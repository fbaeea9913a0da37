"""What methods of low-rank updates share: the product of two factors, and sums of updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftfx.contract.combination import Combination
from peftfx.contract.common.experts import of_experts
from peftfx.errors import PeftfxError
from peftfx.options import CAT
from peftfx.sites.site import EXPERTS, Site

A, B = "lora_A", "lora_B"  #: the names of the factors, here and in files


def padding_in_peft(module: nn.Module) -> str:
    """Return why HF PEFT pads an adapter's input differently from the conv itself. Empty if both pad alike."""
    how, padding = getattr(module, "padding_mode", "zeros"), getattr(module, "padding", 0)
    if how == "zeros" or padding == "valid" or not any(padding if isinstance(padding, tuple) else (padding,)):
        return ""
    return f"its forward pads with zeros where the conv pads by {how!r}, until it is merged"


def product(site: Site, a: Tensor, b: Tensor) -> Tensor:
    """Return `B A` in the shape of the site's weight."""
    if site.kind == "linear":
        return b @ a
    if site.kind == EXPERTS:
        down, up = of_experts(site.shape[0], a, b)
        return torch.bmm(up, down)
    if site.kind == "embedding":
        return (b @ a).T
    r, out = a.shape[0], b.shape[0]
    left = b.view(site.groups, out // site.groups, r // site.groups)
    right = a.reshape(site.groups, r // site.groups, -1)
    return torch.bmm(left, right).reshape(out, *a.shape[1:])


def dense(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of a grouped conv, [out, in / groups, *kernel], as that of the same conv in one group."""
    if groups == 1:
        return weight
    out, inner = weight.shape[0] // groups, weight.shape[1]
    whole = weight.new_zeros(weight.shape[0], inner * groups, *weight.shape[2:])
    for g in range(groups):
        whole[g * out : (g + 1) * out, g * inner : (g + 1) * inner] = weight[g * out : (g + 1) * out]
    return whole


def weighted_sum(factors: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, each times its factor."""
    return torch.stack([f * t for f, t in zip(factors, tensors, strict=True)]).sum(0)


def summed(
    site: Site,
    how: Combination,
    weights: Sequence[float],
    scales: Sequence[float],
    factors: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Return the factors of a sum of low-rank updates `s_i B_i A_i`, each times its weight.

    `cat` is exact: `B A = sum w_i s_i B_i A_i`, at the sum of the ranks. `svd` and the types that end in `_svd` merge
    the updates and cut the result to a rank. `linear` and the other types are HF PEFT's approximations: they merge A
    and B separately, each with the square root of `w_i s_i`, whose sign goes to A.
    """
    down, up = zip(*factors, strict=True)
    both = [w * s for w, s in zip(weights, scales, strict=True)]
    if how.combination_type == CAT:
        groups = site.shape[0] if site.kind == EXPERTS else site.groups
        rows = [(s * a).unflatten(0, (groups, -1)) for s, a in zip(both, down, strict=True)]
        return torch.cat(rows, 1).flatten(0, 1), torch.cat(up, 1)
    if how.cuts:
        return _cut(site, how, weights, [s * product(site, a, b) for s, (a, b) in zip(scales, factors, strict=True)])
    ranks = [len(a) for a in down]
    if len(set(ranks)) > 1:
        what = f"a {how.combination_type} combination needs equal ranks, not {', '.join(map(str, ranks))}"
        raise PeftfxError(what, site.path, "combination_type='cat' (--combination cat), or 'svd'")
    roots = [math.sqrt(abs(s)) for s in both]
    signed = [math.copysign(root, s) for root, s in zip(roots, both, strict=True)]
    return how.merge(signed, down), how.merge(roots, up)


def _cut(site: Site, how: Combination, weights: Sequence[float], updates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if site.kind == EXPERTS or site.groups > 1:
        kind = "stacks of experts" if site.kind == EXPERTS else "convs of several groups"
        raise PeftfxError(f"updates of {kind} cannot be cut to a rank", site.path, "combination_type='cat'")
    merged = how.merge(weights, updates)
    a, b = how.cut(merged.T if site.kind == "embedding" else merged.flatten(1))
    return (
        (a, b) if site.kind != "conv" else (a.view(-1, *merged.shape[1:]), b.view(*b.shape, *(1,) * (merged.ndim - 2)))
    )
