"""LoRAs that approximate other changes of weights: an adapter of any method, or another checkpoint.

The singular value decomposition cuts a weight's update to a rank, or to the rank that holds a share of the update's
energy (the sum of the squared singular values), as HF PEFT's `convert_to_lora` does. One update is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import Base
from peftfx.contract.placed import Placed, Placements
from peftfx.contract.placement import WeightPlacement, site_tensors
from peftfx.contract.weight import widened
from peftfx.errors import PeftfxError, warn
from peftfx.graph.lazy_weights import exact
from peftfx.methods.lora import LoRA
from peftfx.sites.blocks import turned
from peftfx.sites.site import WeightSite

Updates = Iterable[tuple[WeightSite, Tensor]]
"""Sites, each with the tensor that is added to its weight: [out, in, *kernel] or [num, dim], in fp32."""


@torch.no_grad()
def lora_of(updates: Updates, rank: float, records: Mapping[str, object] | None = None) -> tuple[Adapter, float]:
    """Return a LoRA whose effect is that of these updates, cut to a rank; and the share of all energy that it keeps.

    Args:
        updates: the update of each site's weight; updates that are all zero get no placement in the LoRA.
        rank: a whole number is the rank; a float between 0 and 1 is the share of the energy to keep.
        records: what a config says about the base and the task.

    Raises:
        PeftfxError: the rank is not valid or larger than a weight's; a site is a stack of experts or a conv of several
            groups; or there is no update.
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
        kept, whole = kept + float((singular[: len(a)] ** 2).sum()), whole + float((singular**2).sum())
        placements.append(WeightPlacement(LoRA(r=len(a), lora_alpha=len(a)), site))
        values[site.path] = {"lora_A": a, "lora_B": b}
    if not placements:
        raise PeftfxError(
            "this changes no weight, so there is nothing to convert",
            "rank",
            "check that these are the base and the checkpoint that was trained from it",
        )
    target = tuple(f"/{re.escape(p.site.path)}/" for p in placements)
    r = rank if isinstance(rank, int) else placements[0].method.r  # type: ignore[attr-defined]
    made = Adapter([Placed(LoRA(r=r, lora_alpha=r, target=target), Placements(placements))], records)
    for path, params in values.items():
        for name, value in params.items():
            made.put(f"{path}.{name}", value)
    return made, kept / whole


def _factors(site: WeightSite, update: Tensor, rank: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B, and all singular values of the update."""
    if site.kind not in ("linear", "conv", "embedding") or site.groups > 1:
        what = f"an update of a {site.kind}{' of several groups' if site.groups > 1 else ''} is not cut to a rank"
        raise PeftfxError(what, site.path, "leave it out, or merge what changes it")
    flat = update.float().T if site.kind == "embedding" else update.float().flatten(1)
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    kept = rank if isinstance(rank, int) else int(torch.searchsorted((s**2).cumsum(0), rank * (s**2).sum())) + 1
    kept = min(kept, len(s)) if not isinstance(rank, int) else kept
    if kept > len(s):
        raise PeftfxError(f"a weight of {list(flat.shape)} has no rank {kept}", site.path, f"rank={len(s)} or less")
    a, b = vh[:kept].contiguous(), (u[:, :kept] * s[:kept]).contiguous()
    if site.kind != "conv":
        return a, b, s
    return a.view(kept, *update.shape[1:]), b.view(-1, kept, *(1,) * (update.ndim - 2)), s


@torch.no_grad()
def updates_of(base: nn.Module, adapter: Adapter) -> Iterator[tuple[WeightSite, Tensor]]:
    """Yield what an adapter adds to each weight that it acts on.

    Raises:
        PeftfxError: the adapter does more than change weights: with a prompt, copies of the base's tensors, or a bias.
    """
    if beside := adapter.placements.beside_weights:
        what = f"what {type(beside[0].method).__name__} does is no update of a weight"
        raise PeftfxError(what, beside[0].site.path, "convert adapters that act on weights")
    if adapter.overrides:
        what = "a LoRA cannot hold a trained copy of a tensor of the base"
        raise PeftfxError(what, adapter.overrides[0].key.partition(".")[2], "convert an adapter without them")
    groups: dict[str, list[WeightPlacement]] = {}
    for placement in adapter.placements.weights:
        groups.setdefault(placement.site.path, []).append(placement)
    for group in groups.values():
        yield group[0].site, _update(base, adapter, group)


def _update(base: nn.Module, adapter: Adapter, group: Sequence[WeightPlacement]) -> Tensor:
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


@torch.no_grad()
def difference(base: nn.Module, tuned: nn.Module, sites: Iterable[WeightSite]) -> Iterator[tuple[WeightSite, Tensor]]:
    """Yield the difference of the weights of `tuned`, another checkpoint, from those of `base`, site by site.

    A warning names the tensors that differ but are no weight of such a site, because a LoRA cannot hold them.

    Raises:
        PeftfxError: the two checkpoints do not have the same tensors.
    """
    own, others = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, tuned))
    odd = [n for n in own.keys() | others.keys() if n not in own or n not in others or own[n].shape != others[n].shape]
    if odd:
        raise PeftfxError(
            f"the two checkpoints do not have the same tensors: {', '.join(sorted(odd)[:3])}",
            "tuned",
            "give a checkpoint of the same model",
        )
    done = set()
    for site in sites:
        name = site.weight.partition(".")[2]
        if name not in own:
            continue
        done.add(id(own[name]))
        a, b = exact(own[name]), exact(others[name])
        if site.kind in ("linear", "conv", "embedding") and not torch.equal(a, b):
            yield site, turned(b, site.transposed).float() - turned(a, site.transposed).float()
    left = [n for n, t in own.items() if id(t) not in done and not torch.equal(exact(t), exact(others[n]))]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warn(f"these tensors differ too, and a LoRA cannot hold them: {', '.join(left[:3])}{more}")
