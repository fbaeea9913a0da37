"""The resolution of rules: what a user asks for becomes placements and overrides at a model's sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.contract.placed import Placed, Placements
from peftfx.contract.placement import (
    Placement,
)
from peftfx.errors import PeftfxError, warn
from peftfx.rules.naming import as_named
from peftfx.rules.parameters import refuse_read_past, refuse_unknown_parameters
from peftfx.rules.peft_configs import is_peft_config, method_from_object
from peftfx.rules.placements import as_modules, placements_of, where
from peftfx.rules.text import parse_rules
from peftfx.rules.tied_copies import refuse_tied_targets
from peftfx.rules.token_rows import refuse_beside_rows
from peftfx.rules.trained_copies import is_inside, no_module_to_save, overrides_of, saved_modules
from peftfx.rules.unplaced import refuse_unasked, refuse_unplaced, tell_elsewhere, tell_read_past
from peftfx.sites.sites import Sites
from peftfx.sites.target import names_path, unknown_words


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


def refuse_crowding(placed: Iterable[Placed]) -> None:
    """Refuse two rules of one adapter at the same place, because their parameters would have one name."""
    seen: set[str] = set()
    for placement in (p for rule in placed for p in rule.placements):
        if placement.key in seen:
            hint = "narrow one rule's target, or give the second rule an adapter of its own (add_adapter)"
            raise PeftfxError("two rules act here", placement.key, hint)
        seen.add(placement.key)
