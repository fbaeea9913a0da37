"""Show an adapted model, or what rules would make of a model, as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.recipes import Rounding
from peftfx.contract.method import Base, Method
from peftfx.contract.placement import Placement, WeightPlacement, site_tensors
from peftfx.errors import PeftfxError
from peftfx.pages.drawing import Adapted
from peftfx.pages.page import Page
from peftfx.sites.blocks import turned
from peftfx.sites.picture import picture
from peftfx.sites.sites import Sites

_ROUNDED = 64  #: how many rows of a weight are used to measure the rounding of a merge
_MOST = 4  #: how many singular values of an update are shown


def show(base: nn.Module, sites: Sites, adapters: Mapping[str, Adapter], *, values: bool = True) -> Page:
    """Make the page of a model with adapters.

    Args:
        base: the model.
        sites: the sites of the model.
        adapters: the adapters, by name.
        values: whether the adapters have values. If so, the singular values of their updates are shown.
    """
    marks: dict[str, list[Adapted]] = {}
    for name, adapter in adapters.items():
        for placement in adapter.placements:
            told = _told(base, adapter, placement, name if len(adapters) > 1 else "", values=values)
            marks.setdefault(placement.site.path, []).append(told)
    total = sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())
    rules = [type(rule).__name__ for adapter in adapters.values() for rule in adapter.rules]
    lead = f"{', '.join(dict.fromkeys(rules))}: {total:,} parameters are trained" if rules else ""
    before = [type(p.method).__name__ for adapter in adapters.values() for p in adapter.placements.prompts]
    lead += f"; before the text: {', '.join(before)}" if before else ""
    return picture(sites.items, sites.network(), type(base).__name__, marks, lead)


def _told(base: nn.Module, adapter: Adapter, placement: Placement, name: str, *, values: bool) -> Adapted:
    method, params = placement.method, adapter.params(placement)
    rank = getattr(method, "r", None)
    short = f"{type(method).__name__}{f' r={rank}' if isinstance(rank, int) and rank else ''}"
    role = "" if placement.view.role == placement.site.role else f" on {placement.view.role}"
    shapes = ", ".join(f"{key} {'x'.join(map(str, t.shape))}" for key, t in params.items())
    said = [f"{sum(t.numel() for t in params.values()):,} parameters at each site", f"tensors: {shapes}"]
    said += [f"options: {text}"] if (text := _options(method)) else []
    if values:
        said += _of_values(base, placement, params)
    at = f"{name}: " if name else ""
    return Adapted(f"{at}{short}{role}", "\n".join(said), f"{at}{short}")


def _options(method: Method) -> str:
    own = [f for f in dataclasses.fields(method) if f.default is not dataclasses.MISSING]
    given = (f"{f.name}={getattr(method, f.name)!r}" for f in own if getattr(method, f.name) != f.default)
    return ", ".join(given)


def _of_values(base: nn.Module, placement: Placement, params: Mapping[str, Tensor]) -> list[str]:
    """Describe a low-rank update: its largest singular values, and how far a merge rounds. Other methods: nothing."""
    at = placement.on_weight
    found = None if at is None or at.site.kind != "linear" else _low_rank(base, at, params)
    if found is None or at is None:
        return []
    a, b = found
    inner = torch.linalg.qr(b.float()).R @ torch.linalg.qr(a.float().T).R.T
    largest = torch.linalg.svdvals(inner)[:_MOST]
    said = [f"singular values of its update: {', '.join(f'{float(value):.3g}' for value in largest)}"]
    stored, _ = site_tensors(base, at.site)
    if stored.is_floating_point() and stored.dtype != torch.float32:
        weight = turned(stored.detach(), at.site.transposed)[:_ROUNDED].float()
        merged = weight + b[:_ROUNDED].float() @ a.float()
        where = f" in {_ROUNDED} of its rows" if stored.numel() > weight.numel() else ""
        said.append(f"a merge rounds to {str(stored.dtype)[6:]}{where}: {Rounding.of(merged.to(stored.dtype), merged)}")
    return said


def _low_rank(base: nn.Module, at: WeightPlacement, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    weight, bias = site_tensors(base, at.site)
    if at.part is not None or weight.is_meta:
        return None
    p = {name: t.detach().float() if t.is_floating_point() else t.detach() for name, t in params.items()}
    try:
        update = at.method.update(at.view, Base(turned(weight.detach(), at.site.transposed), bias), p)
    except PeftfxError:
        return None
    plain = update.inner is None and update.outer is None
    return (update.a, update.b) if plain and update.a is not None and update.b is not None else None
