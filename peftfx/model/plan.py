"""Plans: what rules would do to a model, computed beforehand: sites, parameters, and why a site is skipped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftfx.adapters.adapter import Adapter
from peftfx.bases.guests import own_parameters
from peftfx.contract.placed import Placed
from peftfx.errors import listed
from peftfx.graph.contexts import fake_mode_of
from peftfx.rules.placements import where
from peftfx.rules.resolution import place
from peftfx.rules.text import write_rule
from peftfx.rules.trained_copies import is_inside, saved_modules
from peftfx.sites.site import Site
from peftfx.sites.sites import Sites
from peftfx.sites.target import explain


@dataclass(frozen=True)
class Touched:
    """The effect of a rule at the sites of one role: how many sites there are, and how many parameters are added."""

    places: int
    parameters: int


@dataclass(frozen=True)
class RulePlan:
    """The effect that one rule would have on a model.

    Attributes:
        rule: the rule as text.
        touched: what the rule does, by the role of the sites; parts of a fused site count under their own roles.
        copies: the tensors of the base that the rule trains copies of (`modules_to_save`, `bias`), with their sizes.
        skipped: the sites where the rule does not act, by the reason.
    """

    rule: str
    touched: Mapping[str, Touched]
    copies: Mapping[str, int]
    skipped: Mapping[str, tuple[Site, ...]]

    @property
    def parameters(self) -> int:
        """The number of parameters that the rule trains."""
        return sum(t.parameters for t in self.touched.values()) + sum(self.copies.values())

    def __str__(self) -> str:
        return "\n".join([f"{self.rule}: {self.parameters:,} parameters", *(f"  {line}" for line in self._lines())])

    def _lines(self) -> Iterator[str]:
        width = max(map(len, self.touched), default=0)
        for role, touched in self.touched.items():
            yield f"{role:{width}}  {touched.places} {_plural(touched.places)}, {touched.parameters:,} parameters"
        if self.copies:
            names, size = list(self.copies), sum(self.copies.values())
            yield f"copies of the base's tensors, {size:,} parameters: {listed(names, 3)}"
        for why, sites in self.skipped.items():
            counts = ", ".join(f"{role} {count}" for role, count in Counter(s.role for s in sites).items())
            yield f"skips {len(sites)} {_plural(len(sites))}, {why}: {counts}"


@dataclass(frozen=True)
class Plan:
    """The effect that rules would have on a model.

    Attributes:
        rules: the plan of each rule.
        parameters: the number of trained parameters; a copy that two rules train is counted once.
        total: the number of all parameters of the adapted model; a trained bias replaces the base's own, as in HF PEFT.
    """

    rules: tuple[RulePlan, ...]
    parameters: int
    total: int

    def __repr__(self) -> str:
        return f"Plan({'; '.join(rule.rule for rule in self.rules)}: {self.parameters:,} parameters)"

    def __str__(self) -> str:
        share = 100 * self.parameters / max(1, self.total)
        last = f"trainable params: {self.parameters:,} || all params: {self.total:,} || trainable%: {share:.4f}"
        return "\n\n".join([*map(str, self.rules), last])

    def to_dict(self) -> dict[str, object]:
        """Return this plan as JSON-ready values."""
        return {"rules": [_as_dict(rule) for rule in self.rules], "parameters": self.parameters, "total": self.total}


def make_plan(base: nn.Module, sites: Sites, rules: object) -> Plan:
    """Return what `transform` would do with these rules; only shapes are computed.

    Raises:
        PeftfxError: for the same reasons as `transform`.
    """
    placed = place(base, sites, rules)
    adapter = shapes_of(base, placed)
    sizes = {name: p.numel() for name, p in adapter.named_parameters()}
    standing = sum(sizes[o.key] for o in adapter.overrides if o.stands)
    total = sum(p.numel() for _, p in own_parameters(base)) + sum(sizes.values()) - standing
    plans = tuple(_plan(base, sites, rule, sizes, adapter) for rule in placed)
    return Plan(plans, sum(sizes.values()), total)


def shapes_of(base: nn.Module, placed: tuple[Placed, ...]) -> Adapter:
    """Return the adapter of these rules, made of fake tensors."""
    own = fake_mode_of(base)
    adapter = Adapter(placed)
    with own if isinstance(own, FakeTensorMode) else FakeTensorMode(allow_non_fake_inputs=True):
        adapter.create(base, None)
    return adapter


def _plan(base: nn.Module, sites: Sites, rule: Placed, sizes: Mapping[str, int], adapter: Adapter) -> RulePlan:
    touched: dict[str, Touched] = {}
    for placement in rule.placements:
        own = sum(sizes.get(f"{placement.key}.{name}", 0) for name in adapter.params(placement))
        before = touched.get(placement.view.role, Touched(0, 0))
        touched[placement.view.role] = Touched(before.places + 1, before.parameters + own)
    copies = {o.key.partition(".")[2]: sizes[o.key] for o in rule.overrides if o.key in sizes}
    return RulePlan(write_rule(rule.method), touched, copies, _skipped(base, sites, rule))


def _skipped(base: nn.Module, sites: Sites, rule: Placed) -> dict[str, tuple[Site, ...]]:
    """Return the sites where a rule does not act, by the reason; empty for a soft prompt, which skips no site."""
    method = rule.method
    if not method.targeted:
        return {}
    found: dict[str, list[Site]] = {}
    adapted, saved = {p.site.path for p in rule.placements}, saved_modules(base, method)
    for reason in explain(sites, **where(method), kinds=sorted(method.kinds)):
        if reason.site.path not in adapted:
            why = reason.why if reason.match is None else "the method's own options leave it out"
            why = "it is in modules_to_save" if is_inside(reason.site.path, saved) else why
            found.setdefault(why, []).append(reason.site)
    return {why: tuple(skipped) for why, skipped in found.items()}


def _plural(count: int) -> str:
    return "site" if count == 1 else "sites"


def _as_dict(plan: RulePlan) -> dict[str, object]:
    return {
        "rule": plan.rule,
        "parameters": plan.parameters,
        "touched": {role: dataclasses.asdict(touched) for role, touched in plan.touched.items()},
        "copies": dict(plan.copies),
        "skipped": {why: [site.path for site in sites] for why, sites in plan.skipped.items()},
    }
