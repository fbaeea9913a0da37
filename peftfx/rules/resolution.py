"""The resolution of rules: what a user asks for becomes placements and overrides at a model's sites."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Method
from peftfx.contract.override import OverrideMethod, copies_of, tied_embedding
from peftfx.contract.pattern import PatternMethod
from peftfx.contract.placed import Placed, Placements
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
from peftfx.errors import PeftfxError, warn
from peftfx.rules.naming import as_named
from peftfx.rules.parameters import as_parameter, refuse_read_past, refuse_unknown_parameters
from peftfx.rules.peft_configs import is_peft_config, method_from_object
from peftfx.rules.text import parse_rules
from peftfx.rules.tied_copies import refuse_tied_targets
from peftfx.rules.token_rows import refuse_beside_rows
from peftfx.rules.trained_copies import is_inside, no_module_to_save, overrides_of, saved_modules
from peftfx.rules.unplaced import refuse_unasked, refuse_unplaced, tell_elsewhere, tell_read_past
from peftfx.sites.site import EXPERTS, WEIGHT_KINDS, HeadedSite, Part, PatternSite, Site, WeightSite
from peftfx.sites.sites import Sites
from peftfx.sites.target import Where, names_path, select, unknown_words

_M = TypeVar("_M", bound=Method)


def place(base: nn.Module, sites: Sites, rules: object) -> tuple[Placed, ...]:
    """Return each rule with its placements, and with the base's tensors that the rule trains."""
    placed = tuple(_place(base, sites, method) for method in as_methods(rules, base))
    refuse_crowding(placed)
    refuse_beside_rows(base, placed)
    tell_elsewhere(sites, acted_at(placed), wrapped_at(placed))
    check_reads(sites, placed)
    return placed


def check_reads(sites: Sites, placed: Iterable[Placed]) -> None:
    """Refuse, or tell of, weights that the model's code reads also where an adapter, or HF PEFT's, does not act."""
    for rule in placed:
        refuse_read_past(sites, rule.method, [p.site for p in rule.placements.weights])
        tell_read_past(sites, [p.site for p in rule.placements if p.copies])


def acted_at(placed: Iterable[Placed]) -> set[str]:
    """Return the module paths where rules act, or whose tensors the rules train copies of."""
    return {
        path
        for rule in placed
        for path in (*(p.site.path for p in rule.placements), *(o.module for o in rule.overrides))
    }


def wrapped_at(placed: Iterable[Placed]) -> set[str]:
    """Return the module paths where methods act for which HF PEFT has a layer around whole attentions."""
    return {p.site.path for rule in placed if rule.method.wraps_attention for p in rule.placements}


def _place(base: nn.Module, sites: Sites, method: Method) -> Placed:
    if method.obstacle is not None:
        raise method.obstacle
    refuse_unasked(base, method)
    refuse_unknown_parameters(base, method, sites)
    saved = saved_modules(base, method)
    if error := no_module_to_save(base, method, saved):
        raise error
    own = [p for p in chosen_placements(method, base, sites) if not is_inside(p.site.path, saved)]
    for word, near in unknown_words(sites, where(method)).items():
        warn(f"{word!r} is no role and no module that this model runs: it picks nothing. {near}".strip())
    if method.exclude_modules and not _excluded(base, method, sites):
        warn(f"exclude_modules={method.exclude_modules!r} names no layer of this model: it excludes nothing")
    own = as_modules(base, method, own)
    refuse_tied_targets(base, method, [p.site.path for p in own])
    if any(p.key.endswith(".") for p in own):  # a copy is kept under its site's path
        what = "the model itself is a targeted layer, and a copy of its tensors has no name: no path leads to it"
        raise PeftfxError(what, type(base).__name__, "put the layer into a module of its own, or target others")
    if not own:
        hint = "leave them out of modules_to_save, or target others"
        raise PeftfxError("every targeted module is in modules_to_save", ", ".join(saved), hint)
    if method.targeted:
        done = {path for p in own for path in (p.site.path, as_named(base, method, p.site).path)}
        done |= set(_inside_of(base, saved))
        refuse_unplaced(base, method, sites, where(method), done)
    return Placed(method, Placements(own), tuple(overrides_of(base, method, saved, [p.site for p in own])))


def _excluded(base: nn.Module, method: Method, sites: Sites) -> bool:
    """Return whether `exclude_modules` names a site, or a layer that this call does not run."""
    named = names_path(method.exclude_modules or (), "exclude_modules")
    paths = (as_named(base, method, site).path for site in sites)
    return any(map(named, paths)) or any(named(path) for path, m in own_modules(base) if m._parameters)


def _inside_of(base: nn.Module, modules: Sequence[str]) -> Iterable[str]:
    return (path for path, _ in own_modules(base) if is_inside(path, modules)) if modules else ()


def as_items(rules: object) -> Sequence[object]:
    """Return the rules as a sequence, in the form in which they were given."""
    return rules if isinstance(rules, Sequence) and not isinstance(rules, str) else (rules,)


def read_rules(rules: object) -> tuple[object, ...]:
    """Return the rules with texts as methods. A `peft` config object stays, as what it means depends on the model.

    Raises:
        PeftfxError: there are none, or one is no rule.
    """
    read: list[object] = []
    for item in as_items(rules):
        if isinstance(item, str):
            read += parse_rules(item)
        elif isinstance(item, Method) or is_peft_config(item):
            read.append(item)
        else:
            raise PeftfxError(
                f"not a rule: {item!r}", "rules", "pass a method, as in LoRA(r=8), a text, or a peft config object"
            )
    if not read:
        raise PeftfxError("there are no rules", "rules", "pass at least one method, as in LoRA(r=8)")
    return tuple(read)


def as_methods(rules: object, base: nn.Module) -> tuple[Method, ...]:
    """Return the rules as methods; a rule is a method, a text, a `peft` config object, or a sequence of these."""
    read = read_rules(rules)
    return tuple(item if isinstance(item, Method) else method_from_object(item, base) for item in read)


def chosen_placements(method: Method, base: nn.Module, sites: Sites) -> Sequence[Placement]:
    """Return a method's placements. If there are none, the error says why the modules that it names have no site."""
    try:
        return placements_of(method, base, sites)
    except PeftfxError:
        refuse_unplaced(base, method, sites, where(method), ())
        raise


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


def as_modules(base: nn.Module, method: Method, placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements of a rule that shares tensors in the order of HF PEFT: that of the base's modules."""
    if type(method).shared is Method.shared:
        return list(placements)
    order = {path: i for i, (path, _) in enumerate(own_modules(base))}
    return sorted(placements, key=lambda p: order.get(p.site.path, len(order)))


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


def prompt_placement(method: SequenceMethod, base: nn.Module, sites: Sites) -> SequencePlacement:
    """Return the only placement of a sequence method: before the text's tokens."""
    site = sequence_site(base, sites)
    return SequencePlacement(method.sized(base, site), site)


def refuse_crowding(placed: Iterable[Placed]) -> None:
    """Refuse two rules of one adapter at the same place, because their parameters would have one name."""
    seen: set[str] = set()
    for placement in (p for rule in placed for p in rule.placements):
        if placement.key in seen:
            hint = "narrow one rule's target, or give the second rule an adapter of its own (add_adapter)"
            raise PeftfxError("two rules act here", placement.key, hint)
        seen.add(placement.key)
