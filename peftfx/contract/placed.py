"""Placed: a rule resolved against a model, with its placements and the tensors that they share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftfx.contract.completeness import asking, refuse_keys, refuse_parameters
from peftfx.contract.method import Base, Method, Params
from peftfx.contract.override import Override
from peftfx.contract.placement import (
    AttentionPlacement,
    PatternPlacement,
    Placement,
    SequencePlacement,
    WeightPlacement,
    whole_tensors,
)
from peftfx.sharding.parts import is_part
from peftfx.sites.blocks import turned
from peftfx.sites.site import Site

DROPOUTS = "dropout_of_rule"  #: the adapter's folder of dropout modules, by the number of the rule
SHARED = "shared_by_rule"  #: the adapter's folder of shared tensors, by the number of the rule
_P = TypeVar("_P", bound=Placement)


class Placements(tuple[Placement, ...]):
    """The placements of all families, in the order of the rules, and those of each family."""

    @functools.cached_property
    def weights(self) -> tuple[WeightPlacement, ...]:
        """The placements at weights."""
        return self._of(WeightPlacement)

    @functools.cached_property
    def beside_weights(self) -> tuple[Placement, ...]:
        """The placements whose effect is not folded into a weight: other families, unfoldable methods."""
        return tuple(placement for placement in self if placement.on_weight is None)

    @functools.cached_property
    def attentions(self) -> tuple[AttentionPlacement, ...]:
        """The placements at attentions."""
        return self._of(AttentionPlacement)

    @functools.cached_property
    def patterns(self) -> tuple[PatternPlacement, ...]:
        """The placements at matches of patterns."""
        return self._of(PatternPlacement)

    @functools.cached_property
    def prompts(self) -> tuple[SequencePlacement, ...]:
        """The placements of soft prompts."""
        return self._of(SequencePlacement)

    def _of(self, family: type[_P]) -> tuple[_P, ...]:
        return tuple(placement for placement in self if isinstance(placement, family))


@dataclass(frozen=True)
class Placed:
    """A rule resolved against a model.

    Attributes:
        method: the rule's method, with the rule's options.
        placements: where the method acts.
        overrides: the base's tensors of which the rule trains copies (`modules_to_save`, `bias`).
        counted: the sites that HF PEFT counts for the tensors that the places share, in the base's order: of modules
            that the call does not run, too. Empty if they are the placements' alone.
    """

    method: Method
    placements: Placements
    overrides: tuple[Override, ...] = ()
    counted: tuple[Site, ...] = ()

    def dropping(self, rate: float) -> Placed:
        """Return the rule with another rate of its dropout."""
        return self.changed(self.method.dropout_option, rate)

    def changed(self, name: str, value: object) -> Placed:
        """Return the rule with another value of an option, at all of its places."""
        option: dict[str, Any] = {name: value}
        method = dataclasses.replace(self.method, **option)
        placed = (dataclasses.replace(p, method=dataclasses.replace(p.method, **option)) for p in self.placements)
        return dataclasses.replace(self, method=method, placements=Placements(placed))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, or the parts of sites, that the rule's shared tensors are for."""
        return self.counted or tuple(p.view for p in self.placements)

    def reads(self, placement: Placement, shared: Params) -> dict[str, str]:
        """Return which shared tensors `placement` reads: by its name there, the name that the tensor is shared by."""
        chosen = self.method.shares(self.sites, placement.view) if shared else {}
        return {name: name for name in shared} if chosen is None else chosen


def shared_by(rule: Placed, base: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
    """Return new tensors that the places of a rule share.

    Args:
        rule: the rule.
        base: the base.
        rng: the generator of random numbers.

    Raises:
        PeftfxError: the method's `shared` does not give tensors by name, or `shared_keys` leaves out a trained tensor.
    """
    if not rule.placements:
        return {}
    method = rule.method
    first = next((p.detach() for p in base.parameters() if p.is_floating_point()), torch.empty(0))
    like = torch.empty(0, dtype=first.dtype, device=first.device) if is_part(first) else first
    with asking(method, "shared", ""):
        made = method.shared(rule.sites, _bases(rule, base), like, rng)
        keys = method.shared_keys(rule.sites)
    refuse_parameters(method, "", made, member="shared")
    if rule.counted:  # what only the places read that do not run is not made
        read = {kept for placement in rule.placements for kept in rule.reads(placement, made).values()}
        made = {name: value for name, value in made.items() if name in read or name in keys}
    named = {rule.reads(p, made).get(name) for p in rule.placements for name in p.suffixes()} if made else set()
    refuse_keys(method, "shared_keys", "", keys, {name: t for name, t in made.items() if name not in named})
    return made


def _bases(rule: Placed, base: nn.Module) -> Iterator[Base]:
    """Yield the tensors of the base at each site of a rule with weights."""
    at = {p.view: p for p in rule.placements.weights}
    for site in rule.sites if at else ():
        own = at.get(site)
        weight, bias = whole_tensors(base, own.site if own else site)
        yield own.base(weight, bias) if own else Base(turned(weight, site.transposed), bias)
