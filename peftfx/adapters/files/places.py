"""The places that an adapter's file has tensors for, and the names of these tensors in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from peftfx.adapters.files.names import name_of
from peftfx.adapters.files.parameters import parameter_path
from peftfx.adapters.files.torch_attention import path_in_file
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.contract.placed import Placements
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError
from peftfx.rules.parameters import picks
from peftfx.rules.peft_files import Weights
from peftfx.rules.placements import as_modules, placement_at, placements_of, where, without_ties
from peftfx.rules.resolution import chosen_placements
from peftfx.rules.trained_copies import is_inside, saved_modules
from peftfx.rules.unplaced import named_elsewhere, refuse_unplaced
from peftfx.sites.site import EXPERTS, WEIGHT_KINDS
from peftfx.sites.sites import Sites


@dataclass(frozen=True)
class FilePlaces:
    """The places of a method that a file has tensors for.

    Attributes:
        placements: the method's placements there.
        left_out: those that the config leaves out.
        targeted: the paths that the config's own targets match.
        marks: the first words of the names of a placement's tensors; empty if it saves none.
    """

    placements: list[Placement]
    left_out: list[Placement]
    targeted: set[str]
    marks: set[str]


def places_in(weights: Weights, method: Method, base: nn.Module, sites: Sites) -> FilePlaces:
    """Return the places of a method that a file has tensors for.

    If the method's placements save no tensors of their own, only the config says which placements there are.
    """
    able = (s for s in sites if method.acts_at(s) and (s.kind != EXPERTS or picks(method, s.parameter)))
    possible = [placement_at(method, base, site) for site in able]
    marks = {end.partition(".")[0] for p in (*possible, *_other_kinds(possible)) for end in p.file_suffixes().values()}
    marks |= method.by_size if possible else frozenset()
    placements = [p for p in possible if any(name in weights.names for name in names_in_file(p, base))]
    targeted = _targeted(base, method, sites)
    left_out = _left_out(placements, targeted, method, base)
    placements = [p for p in placements if p not in left_out]
    if not marks:
        saved = saved_modules(base, method)
        placements = [p for p in chosen_placements(method, base, sites) if not is_inside(p.site.path, saved)]
        refuse_unplaced(base, method, sites, where(method), {p.site.path for p in placements}, loaded=True)
    return FilePlaces(as_modules(base, method, without_ties(placements)), left_out, targeted, marks)


def _other_kinds(possible: Sequence[Placement]) -> Iterator[Placement]:
    """Yield placements as at sites of other kinds, whose tensors have other names: this call may run none of them."""
    for first in Placements(possible).weights[:1]:
        for kind in sorted(first.method.kinds & set(WEIGHT_KINDS)):
            yield dataclasses.replace(first, site=dataclasses.replace(first.site, kind=kind))


def names_in_file(placement: Placement, base: nn.Module) -> dict[str, str]:
    """Return a placement's names in the file, each with the adapter's key for its value."""
    path = path_in_file(base, placement.method, placement.site.path, placement.known_as)
    return {name_of(path, suffix): f"{placement.key}.{name}" for name, suffix in placement.file_suffixes().items()}


def path_for_config(placement: Placement, base: nn.Module) -> str:
    """Return the path of a placement's module, as the config's targets see it."""
    return placement.known_as or parameter_path(base, placement.method, placement.site.path)


def _targeted(base: nn.Module, method: Method, sites: Sites) -> set[str]:
    """Return the paths of the sites that the config's own targets match; an empty set if none of them runs."""
    names = method.target_modules or method.target_parameters
    try:
        placements = placements_of(method, base, sites) if names else []
    except PeftfxError:
        return set()
    return {path_for_config(p, base) for p in placements}


def _left_out(
    placements: list[Placement], targeted: Collection[str], method: Method, base: nn.Module
) -> list[Placement]:
    """Return the placements that the file has tensors for, but that the config leaves out, as HF PEFT does."""
    if not (method.target_modules or method.target_parameters):
        return []
    return [p for p in placements if path_for_config(p, base) not in targeted]


def places_beside(
    method: Method, placements: Sequence[Placement], saved: Sequence[str], base: nn.Module, sites: Sites
) -> list[str]:
    """Return the paths of modules that a rule names and does not act in, and that it does not train whole."""
    done = {path for p in placements for path in (p.site.path, path_for_config(p, base))}
    done |= {path for path, _ in own_modules(base) if is_inside(path, saved)}
    return named_elsewhere(base, method, sites, where(method), done)
