"""Targets: the sites where a rule applies, by an expression over roles and names, or by HF PEFT's `target_modules`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from peftfx.errors import PeftfxError, nearest
from peftfx.field_types import refuse_misfits
from peftfx.sites.expression import (
    ALL_LINEAR,
    Picker,
    Target,
    Units,
    all_linear,
    ends_of,
    ends_with_any,
    is_role,
    parse,
    units,
    words_of,
)
from peftfx.sites.patterns import compiled, quick
from peftfx.sites.site import EXPERTS, HEAD, ROLES, WEIGHT_KINDS, Site

Modules = str | Collection[str]


@dataclass(frozen=True)
class SelectedSite:
    """A site that a target picked. `parts` names the roles of the picked rows, if not the whole site is picked."""

    site: Site
    parts: tuple[str, ...] = ()


class Where(TypedDict, total=False):
    """The options of `select` and `explain` that say where a rule applies. Each may be left out.

    Attributes:
        target: an expression (see this module), a compiled pattern that must match a whole path, or several
            expressions, any of which may match.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: as in HF PEFT. A list holds paths or ends
            of paths; a string is a regular expression that must match a whole path, or "all-linear".
        target_parameters: as in HF PEFT: parameters by their full names or the ends of these, alone or in addition to
            other targets.
        default: the expression that is used if neither `target` nor `target_modules` is given; `all-linear` if left
            out.
    """

    target: Target | None
    target_modules: Modules | None
    target_parameters: Collection[str] | None
    exclude_modules: Modules | None
    layers_to_transform: int | Collection[int] | None
    layers_pattern: str | Collection[str] | None
    default: str


@dataclass(frozen=True)
class Reason:
    """The reason why a site was picked or was not."""

    site: Site
    match: SelectedSite | None
    why: str


def select(
    sites: Iterable[Site], *, kinds: Collection[str] = WEIGHT_KINDS, **where: Unpack[Where]
) -> list[SelectedSite]:
    """Return the sites that a rule applies to, in the order in which they run.

    Args:
        sites: the sites to pick from.
        kinds: the kinds of sites that may be picked.
        where: where the rule applies; see `Where`.

    Raises:
        PeftfxError: the arguments contradict each other, an expression cannot be read, or nothing matches.
    """
    reasons = explain(sites, kinds=kinds, **where)
    matches = [reason.match for reason in reasons if reason.match]
    if not matches:
        raise _of_other_kinds(sites, kinds, where) or _nothing_matches(reasons, where)
    return matches


def unknown_words(sites: Collection[Site], where: Where) -> dict[str, str]:
    """Return a target's words that are no role and no module here, so pick nothing, with the nearest known word."""
    target, modules = where.get("target"), where.get("target_modules")
    asked = target if modules is None else () if isinstance(modules, str) else modules
    items = (asked,) if isinstance(asked, str) else () if isinstance(asked, re.Pattern) else tuple(asked or ())
    said = [words_of(item) if modules is None else (item,) for item in items if isinstance(item, str)]
    paths = [path for site in sites for path in (site.path, site.parameter) if path]
    known = {part for name in (*paths, *(site.role for site in sites)) for part in _runs(name)}
    lost = [word for words in said for word in words if not is_role(word) and word not in known]
    ends = {path.rpartition(".")[2] for path in paths}
    return {word: nearest(word, {*ends, *(ROLES if modules is None else ())}) for word in lost}


def explain(sites: Iterable[Site], *, kinds: Collection[str] = WEIGHT_KINDS, **where: Unpack[Where]) -> list[Reason]:
    """Return for every site whether `select` would pick it, and why. Only senseless arguments raise an error."""
    if unknown := next((name for name in where if name not in Where.__annotations__), None):
        raise PeftfxError(f"a target has no option {unknown!r}", "target", nearest(unknown, Where.__annotations__))
    refuse_misfits(where, Where, "target")
    target, target_modules, parameters = (
        where.get("target"),
        where.get("target_modules"),
        where.get("target_parameters"),
    )
    layers_to_transform, layers_pattern = where.get("layers_to_transform"), where.get("layers_pattern")
    if target is not None and target_modules is not None:
        raise PeftfxError("target and target_modules are both given", str(target), "give one of them")
    if isinstance(target_modules, str) and layers_to_transform is not None:
        raise PeftfxError(
            "layers_to_transform needs a list of target_modules, not a regular expression",
            target_modules,
            "give the modules as a list, put the layers into the expression, or say target= instead",
        )
    picker = _picker(sites, where)
    exclude = where.get("exclude_modules")
    excluded = (lambda site: False) if not exclude else _named(exclude, "exclude_modules")
    layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform or ())
    names = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or ())
    patterns = [quick(name, "layers_pattern", _LAYER) for name in names]
    # HF PEFT does not apply the filter on layers to a module that is listed by its full path.
    exempt = target_modules if target_modules is not None and not isinstance(target_modules, str) else ()

    def reason(site: Site) -> Reason:
        if site.kind not in kinds:
            return Reason(site, None, f"its kind, {site.kind}, is not one of {', '.join(kinds)}")
        if ends_with_any(site.parameter, parameters or ()) and site.kind in BY_PARAMETER:
            return Reason(site, SelectedSite(site), "target_parameters name its weight")
        match = _match(site, picker(site))
        if match is None:
            return Reason(site, None, "the target does not match its path or role")
        if excluded(site):
            return Reason(site, None, "exclude_modules matches its path")
        layer = site.layer if target_modules is None and not patterns else _layer(site.path, patterns)
        if layers and site.path not in exempt and layer not in layers:
            return Reason(site, None, "its layer is not in layers_to_transform")
        return Reason(site, match, f"the target matches {', '.join(match.parts) or 'it'}")

    return [reason(site) for site in sites]


def _picker(sites: Iterable[Site], where: Where) -> Picker:
    modules, target = where.get("target_modules"), where.get("target")
    if modules is not None:
        return _modules(modules)
    if target is None and where.get("target_parameters"):
        return lambda site: frozenset()
    return parse(where.get("default", ALL_LINEAR) if target is None else target)(sites)


def _modules(modules: Modules) -> Picker:
    if isinstance(modules, str) and modules.lower() == ALL_LINEAR:
        return lambda site: frozenset() if site.path == site.parameter else all_linear(site)
    named = _named(modules, "target_modules")
    return lambda site: units(site) if site.kind != EXPERTS and named(site) else frozenset()


def _named(modules: Modules, option: str) -> Callable[[Site], bool]:
    names = names_path(modules, option)
    return lambda site: names(site.path)


def names_path(modules: Modules, option: str) -> Callable[[str], bool]:
    """Return the function that says whether modules, given as in HF PEFT in this `option`, name a module's path."""
    if isinstance(modules, str):
        pattern = compiled(modules, option)
        return lambda path: bool(pattern.fullmatch(path))
    names = frozenset(modules)
    return lambda path: not names.isdisjoint(ends_of(path))


_LAYER = r"(?:^|.*?\.)(?:{})\.(?P<layer>\d+)\."


def _layer(path: str, patterns: Sequence[re.Pattern[str]]) -> int | None:
    """Return the layer as HF PEFT counts it: the first number in the path, or the number after one of `patterns`."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<layer>\d+)\.", path)
        return int(found["layer"]) if found else None
    matches = (pattern.match(path) for pattern in patterns)
    return next((int(found["layer"]) for found in matches if found), None)


BY_PARAMETER = ("linear", "embedding", EXPERTS)  #: kinds of sites whose weights `target_parameters` name
_FEW = 8  #: the most words of a target that are compared with the model's names
_OF_PEFT = "peft has adapted this model, and its layers are called base_layer: pass the model without adapters"


def _match(site: Site, picked: Units) -> SelectedSite | None:
    if not picked:
        return None
    return SelectedSite(site, () if picked == units(site) else tuple(p.role for p in site.parts if p.role in picked))


def _runs(path: str) -> Iterator[str]:
    """Yield each run of names in a path: a module's path, the end of a path, or the path of a parent."""
    names = path.split(".")
    for start in range(len(names)):
        yield from (".".join(names[start:end]) for end in range(start + 1, len(names) + 1))


def _of_other_kinds(sites: Iterable[Site], kinds: Collection[str], where: Where) -> PeftfxError | None:
    """Return the error for a target that picks sites, but none of a kind that may be picked; or None."""
    picker = _picker(sites, where)
    others = sorted({site.kind for site in sites if site.kind not in kinds and picker(site)})
    if not others:
        return None
    what = f"the target picks only sites of kind {', '.join(others)}, which this rule does not act on"
    return PeftfxError(
        what, ", ".join(_asked(where)), f"target sites of kind {', '.join(kinds)}; peftfx.inspect shows them"
    )


def _asked(where: Where) -> list[str]:
    """Return what the target asked for, as texts."""
    modules, target = where.get("target_modules") or where.get("target_parameters"), where.get("target")
    asked = modules if modules is not None else where.get("default", ALL_LINEAR) if target is None else target
    items = [asked] if isinstance(asked, str | re.Pattern) else list(asked)
    return [item.pattern if isinstance(item, re.Pattern) else item for item in items]


def _nothing_matches(reasons: Sequence[Reason], where: Where) -> PeftfxError:
    if where.get("target_modules") is not None and not (where["target_modules"] or where.get("target_parameters")):
        what = "it names no module, and there are no target_parameters"
        return PeftfxError(what, "target_modules", "name modules, or leave it out: the method then takes its own")
    texts = _asked(where)
    sites = [reason.site for reason in reasons]
    names = {end for site in sites for end in (site.path, site.path.rpartition(".")[2])}
    words = dict.fromkeys(word for text in texts for word in re.findall(r"[\w.-]+", text))
    lost = [word for word in list(words)[:_FEW] if word not in names and not is_role(word)]
    close = [found for word in lost if (found := nearest(word, {*names, *ROLES}))]
    matched_but = {reason.why for reason in reasons if reason.why.startswith(("exclude", "its layer"))}
    roles = ", ".join(f"{role} ({count})" for role, count in sorted(Counter(site.role for site in sites).items()))
    ours = [_OF_PEFT] if any(site.path.endswith(".base_layer") for site in sites) else []
    named = where.get("target_modules")
    if isinstance(named, str) and any(ends_with_any(name, [named]) for name in names):
        ours.append(f"a text is a regular expression for the whole name, as in HF PEFT: pass a list, [{named!r}]")
    if all(site.role in (site.kind, HEAD) for site in sites) and any(is_role(word) for word in words):
        ours.append("no other roles are known here than kinds of layers and heads: name modules by target_modules")
    hint = "; ".join([*ours, *sorted(matched_but), *close, f"The model has {roles or 'no site'}"])
    return PeftfxError("the target matches no site", ", ".join(texts), hint)
