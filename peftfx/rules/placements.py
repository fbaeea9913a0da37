"""The placements of a method at a model's sites, by the kind of method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Method
from peftfx.contract.override import OverrideMethod, copies_of, tied_embedding
from peftfx.contract.pattern import PatternMethod
from peftfx.contract.placement import (
    AttentionPlacement,
    OverridePlacement,
    PatternPlacement,
    Placement,
    SequencePlacement,
    WeightPlacement,
)
from peftfx.contract.sequence import SequenceMethod, sequence_site
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.rules.naming import as_named
from peftfx.rules.parameters import as_parameter
from peftfx.sites.site import EXPERTS, WEIGHT_KINDS, HeadedSite, Part, PatternSite, Site, WeightSite
from peftfx.sites.sites import Sites
from peftfx.sites.target import Where, select

_M = TypeVar("_M", bound=Method)


def where(method: Method) -> Where:
    """Return the options of a method that say where it applies."""
    return {
        "target": method.target,
        "target_modules": method.target_modules,
        "target_parameters": method.target_parameters,
        "exclude_modules": method.exclude_modules,
        "layers_to_transform": method.layers_to_transform,
        "layers_pattern": method.layers_pattern,
        "default": method.default_target,
    }


@functools.singledispatch
def placements_of(method: Method, base: nn.Module, sites: Sites) -> Sequence[Placement]:
    """Return a method's placements: one for each targeted site, or one for each targeted part of a fused site."""
    raise PeftfxError(f"{type(method).__name__} does not act on weights", "rules", "use a weight method, as LoRA")


@placements_of.register
def _(method: WeightMethod, base: nn.Module, sites: Sites) -> list[WeightPlacement]:
    placements = []
    named = {as_named(base, method, site): site for site in sites}
    chosen = dataclasses.replace(sites, items=tuple(named))
    for match in select(chosen, **where(method), kinds=(*WEIGHT_KINDS, EXPERTS)):
        if match.site.kind not in method.kinds:
            what = f"{type(method).__name__} does not act on a site of kind {match.site.kind}"
            raise PeftfxError(what, match.site.path, f"target sites of kind {', '.join(sorted(method.kinds))}")
        parts: list[Part | None] = [p for p in match.site.parts if p.role in match.parts]
        own = method.at(as_parameter(method, match.site))
        site = sites.weights_by_path[named[match.site].path]
        placements += [WeightPlacement(own, site, part) for part in parts or [None]]
    return placements


@placements_of.register
def _(method: AttentionMethod, base: nn.Module, sites: Sites) -> list[AttentionPlacement]:
    # By default the method acts at every attention that it can act at; otherwise it must act at each targeted one.
    if isinstance(method.target_modules, str):  # in HF PEFT this text is the end of a path, not an expression
        method = dataclasses.replace(method, target_modules=(method.target_modules,))
    found = {match.site for match in select(sites, **where(method), kinds=method.kinds)}
    able = [site for site in sites.headed if site in found]
    named = method.target is not None or method.target_modules is not None
    others = (site for site in sites.attentions if site in found and site.heads is None)
    unable = next(others, None) if named or not able else None
    if unable is not None:
        what = f"{type(method).__name__} cannot act at this attention: {unable.headless}"
        raise PeftfxError(what, unable.path, "target others, or use a method that acts on weights, as LoRA")
    return [AttentionPlacement(method, site) for site in method.among(able)]


@placements_of.register
def _(method: PatternMethod, base: nn.Module, sites: Sites) -> list[PatternPlacement]:
    own = dataclasses.replace(sites, items=tuple(site for site in sites if method.acts_at(site)))
    if not own.items:
        near = sites.misses.get(method.pattern.name)
        what = f"the pattern {method.pattern.name} matches nothing in this model"
        hint = f"the closest: {near}" if near else "no node of the graph computes what its last operator does"
        raise PeftfxError(what, method.pattern.role, f"{hint}; another spelling is added by `.also`")
    chosen = {match.site for match in select(own, **where(method), kinds=sorted(method.kinds))}
    return [PatternPlacement(method.at(site), site) for site in own.patterns if site in chosen]


@placements_of.register
def _(method: OverrideMethod, base: nn.Module, sites: Sites) -> list[Placement]:
    found, named = [], {as_named(base, method, site): site for site in sites}
    for match in select(named, **where(method), kinds=sorted(method.kinds)):
        if match.parts:
            what = f"{type(method).__name__} trains whole tensors, and {match.parts[0]} is rows of one here"
            raise PeftfxError(what, match.site.path, f"target {match.site.role}, or the module by its name")
        found.append(placement_at(method, base, named[match.site]))
    found = [placement for placement in found if placement.copies]
    if not found:
        raise PeftfxError(f"no targeted module has what {type(method).__name__} trains", "target", "widen it")
    return without_ties(found)


@placements_of.register
def _(method: SequenceMethod, base: nn.Module, sites: Sites) -> list[SequencePlacement]:
    return [prompt_placement(method, base, sites)]


def as_modules(base: nn.Module, method: Method, placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements of a rule that shares tensors in the order of HF PEFT: that of the base's modules."""
    if type(method).shared is Method.shared:
        return list(placements)
    order = {path: i for i, (path, _) in enumerate(own_modules(base))}
    return sorted(placements, key=lambda p: order.get(p.site.path, len(order)))


def without_ties(placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements, with only one for each tied tensor whose rows are trained wherever it is used."""
    rows = {p.site.weight: p for p in reversed(placements) if any(c.rows and not c.module for c in p.copies)}
    return [p for p in placements if rows.get(p.site.weight, p) is p]


@functools.singledispatch
def placement_at(method: Method, base: nn.Module, site: Site) -> Placement:
    """Return the placement of a method at a whole site."""
    raise PeftfxError(f"{type(method).__name__} acts at no site", site.path, "use a weight method, as LoRA")


@placement_at.register
def _(method: WeightMethod, base: nn.Module, site: WeightSite) -> WeightPlacement:
    return WeightPlacement(_as_at(method, base, site), site)


@placement_at.register
def _(method: AttentionMethod, base: nn.Module, site: HeadedSite) -> AttentionPlacement:
    return AttentionPlacement(_as_at(method, base, site), site)


@placement_at.register
def _(method: PatternMethod, base: nn.Module, site: PatternSite) -> PatternPlacement:
    return PatternPlacement(method.at(site), site)


@placement_at.register
def _(method: OverrideMethod, base: nn.Module, site: Site) -> OverridePlacement:
    own = _as_at(method, base, site)
    return OverridePlacement(own, site, copies_of(base, own, site), tied_embedding(base, own, site))


def _as_at(method: _M, base: nn.Module, site: Site) -> _M:
    """Return a method with the options that it has at a site."""
    return method.at(as_parameter(method, as_named(base, method, site)))


def prompt_placement(method: SequenceMethod, base: nn.Module, sites: Sites) -> SequencePlacement:
    """Return the only placement of a sequence method: before the text's tokens."""
    site = sequence_site(base, sites)
    return SequencePlacement(method.sized(base, site), site)
