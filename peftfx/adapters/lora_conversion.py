"""LoRAs that approximate other changes of weights: an adapter of any method, or what `checkpoint_difference` finds.

The singular value decomposition cuts a weight's update to a rank, or to the rank that holds a share of the update's
energy (the sum of the squared singular values), as HF PEFT's `convert_to_lora` does. One update is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.contract.common.experts import joint
from peftfx.contract.method import Base
from peftfx.contract.override import Override
from peftfx.contract.placed import Placed, Placements
from peftfx.contract.placement import WeightPlacement, site_tensors
from peftfx.contract.weight import widened
from peftfx.errors import PeftfxError
from peftfx.graph.lazy_weights import exact
from peftfx.methods.lora import LoRA
from peftfx.sites.blocks import turned
from peftfx.sites.site import EXPERTS, WEIGHT_KINDS, WeightSite

Updates = Iterable[tuple[WeightSite, Tensor]]
"""Sites, each with the tensor that is added to its weight: [out, in, *kernel], [num, dim] or [experts, out, in]."""


@torch.no_grad()
def lora_of(
    updates: Updates,
    rank: float,
    records: Mapping[str, object] | None = None,
    copies: Mapping[Override, Tensor] | None = None,
) -> tuple[Adapter, float]:
    """Return a LoRA whose effect is that of these updates, cut to a rank; and the share of all energy that it keeps.

    Args:
        updates: the update of each site's weight; updates that are all zero get no placement in the LoRA.
        rank: a whole number is the rank, and weights that have no such rank keep all of theirs; a float between 0 and 1
            is the share of the energy to keep.
        records: what a config says about the base and the task.
        copies: the trained copies that the LoRA has too (`modules_to_save`); see `copies_beside`.

    Raises:
        PeftfxError: the rank is not valid, or larger than that of each weight; a site is a conv of several groups; or
            there is no update, or one that is not finite.
    """
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise PeftfxError(
            f"the rank must be 1 or more, or a share between 0 and 1, not {rank}", "rank", "rank=8, or rank=0.95"
        )
    placements, values = [], {}
    kept = whole = 0.0
    for site, update in updates:
        if not update.any():
            continue
        a, b, singular = _factors(site, update, rank)
        r = b.shape[-1] if site.kind == EXPERTS else len(a)
        kept, whole = kept + float((singular[..., :r] ** 2).sum()), whole + float((singular**2).sum())
        if site.kind == EXPERTS:
            a, b = joint(a, b)
        placements.append(WeightPlacement(LoRA(r=r, lora_alpha=r), site))
        values[site.path] = {"lora_A": a, "lora_B": b}
    if not placements:
        raise PeftfxError(
            "this changes no weight, so there is nothing to convert",
            "rank",
            "check that these are the base and the checkpoint that was trained from it",
        )
    largest = max(p.method.r for p in placements)  # type: ignore[attr-defined]
    if isinstance(rank, int) and largest < rank:
        what = f"no weight that is changed has rank {rank}: the largest rank is {largest}"
        raise PeftfxError(what, "rank", f"rank={largest} or less")
    target = tuple(f"/{re.escape(p.site.path)}/" for p in placements)
    r = rank if isinstance(rank, int) else placements[0].method.r  # type: ignore[attr-defined]
    copies = copies or {}
    saved = tuple(sorted({override.module for override in copies})) or None
    rule = LoRA(r=r, lora_alpha=r, target=target, modules_to_save=saved)
    made = Adapter([Placed(rule, Placements(placements), tuple(copies))], records)
    for path, params in values.items():
        for name, value in params.items():
            made.put(f"{path}.{name}", value)
    for override, value in copies.items():
        made.put(override.key, value.detach().clone(), trained=isinstance(value, nn.Parameter))
    return made, kept / whole


def _factors(site: WeightSite, update: Tensor, rank: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B, and all singular values of the update; those of each expert, for a stack of experts' weights."""
    if not holds(site):
        what = f"the update of a {site.kind}{' of several groups' if site.groups > 1 else ''} cannot be cut to a rank"
        raise PeftfxError(what, site.path, "leave it out, or merge what changes it")
    if not update.isfinite().all():
        what = "the update of this weight holds NaN or an infinity"
        raise PeftfxError(what, site.path, "look at the training that made it, or at its file")
    flat = update.float() if site.kind == EXPERTS else update.float().flatten(1)
    flat = flat.mT if site.kind == "embedding" else flat
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    kept = min(rank if isinstance(rank, int) else _rank_of_share(s**2, rank), s.shape[-1])
    a, b = vh[..., :kept, :].contiguous(), (u[..., :kept] * s[..., None, :kept]).contiguous()
    if site.kind != "conv":
        return a, b, s
    return a.view(kept, *update.shape[1:]), b.view(-1, kept, *(1,) * (update.ndim - 2)), s


def _rank_of_share(energies: Tensor, share: float) -> int:
    """Return the rank that holds this share of the energy: of all experts' energy, for a stack."""
    each = energies.flatten(0, -2).sum(0) if energies.ndim > 1 else energies
    return int(torch.searchsorted(each.cumsum(0), share * each.sum())) + 1


def holds(site: WeightSite) -> bool:
    """Return whether a LoRA of a rank can approximate any update of this site's weight."""
    return site.kind in (*WEIGHT_KINDS, EXPERTS) and site.groups == 1


@torch.no_grad()
def updates_of(base: nn.Module, adapter: Adapter) -> Iterator[tuple[WeightSite, Tensor]]:
    """Yield what an adapter adds to each weight that it acts on.

    Raises:
        PeftfxError: the adapter does more than change weights: with a prompt, or a bias. Its copies of the base's
            tensors are those of `copies_beside`.
    """
    if beside := adapter.placements.beside_weights:
        what = f"{type(beside[0].method).__name__} does not update weights, so no LoRA has its effect"
        raise PeftfxError(what, beside[0].site.path, "convert adapters that act on weights")
    groups: dict[str, list[WeightPlacement]] = {}
    for placement in adapter.placements.weights:
        groups.setdefault(placement.site.path, []).append(placement)
    for group in groups.values():
        yield group[0].site, _update(base, adapter, group)


def copies_beside(adapter: Adapter) -> dict[Override, Tensor]:
    """Return an adapter's trained copies of whole modules, which a LoRA has beside its updates (`modules_to_save`).

    Raises:
        PeftfxError: the adapter trains other tensors of the base: biases, rows of tokens, or one copy for tied modules.
    """
    for override in adapter.overrides:
        if not override.module or override.rows or override.tied:
            what = "a LoRA of another adapter has its copies of whole modules, and no other tensor of the base"
            raise PeftfxError(what, override.key.partition(".")[2], "convert an adapter without this")
    return {override: adapter.get(override.key) for override in adapter.overrides}


def _update(base: nn.Module, adapter: Adapter, group: Sequence[WeightPlacement]) -> Tensor:
    """Return the sum of what the placements of one site add to its weight."""
    site = group[0].site
    stored, bias = site_tensors(base, site)
    weight = turned(exact(stored), site.transposed).float()
    whole = torch.zeros_like(weight)
    for placement in group:
        own, block = placement.base(exact(stored), bias), placement.block
        start = Base(own.weight.float(), None if own.bias is None else own.bias.float())
        made = placement.method.fold(placement.view, start, widened(adapter.params(placement)))
        if made.bias is not start.bias:
            what = f"{type(placement.method).__name__} changes a bias, and a LoRA has none"
            raise PeftfxError(what, site.path, "merge it instead")
        if made.weight.shape != start.weight.shape:
            raise PeftfxError(
                "its update mixes the groups of a grouped conv, and a LoRA cannot", site.path, "merge it instead"
            )
        delta = made.weight - start.weight
        whole = delta if block is None else block.put(whole, delta, site.rows_axis)
    return whole
