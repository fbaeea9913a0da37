"""Test cases of the laws: a model, a method and sizes. Strategies for a method's options come from its fields."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis import strategies as st

from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Method
from peftfx.contract.override import OverrideMethod, copies_of
from peftfx.contract.pattern import PatternMethod
from peftfx.contract.placed import Placed, Placements, shared_by
from peftfx.contract.placement import WeightPlacement
from peftfx.contract.sequence import SequenceMethod
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.rules.placements import prompt_placement
from peftfx.sites.site import AttentionSite, PatternSite, Site, WeightSite
from peftfx.testing.models import Spec
from peftfx.testing.pool import POOL, PROMPTED, captured

Choices = Mapping[str, Sequence[object]]
"""The values to draw from, for options whose values their type does not tell."""
_LAWS = settings(
    deadline=None,
    derandomize=True,  # the same examples in every run: a law that fails fails for everybody
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)


def examples(count: int, *, shrink: bool = True) -> settings:
    """Return hypothesis settings with this many examples, the same in each run; failures shrink if `shrink`."""
    phases = tuple(Phase) if shrink else (Phase.generate,)
    return settings(_LAWS, max_examples=count, phases=phases)


@dataclass(frozen=True)
class Case:
    """A model, the sizes of a call, and the seed of everything random. Pasting the repr reproduces a failure."""

    spec: Spec
    batch: int = 2
    sequence: int = 3
    seed: int = 0

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a call of these sizes."""
        return self.spec.inputs(self.batch, self.sequence, self.seed)


def configs(cls: type[Method], choices: Choices | None = None) -> st.SearchStrategy[Method]:
    """Return a strategy for methods of a class, without a target; it shrinks to the method without options."""
    shared = _sizes() if issubclass(cls, SequenceMethod) else {f.name for f in dataclasses.fields(Method)}
    hints = typing.get_type_hints(cls)
    known = {name: st.sampled_from(values) for name, values in (choices or {}).items()}
    fields = [f for f in dataclasses.fields(cls) if f.name not in shared and f.init]
    options = {f.name: known.get(f.name, _values(f.name, hints[f.name])) for f in fields}
    drawn = {name: values for name, values in options.items() if values is not None}
    needed = {f.name: drawn.pop(f.name) for f in fields if f.name in known and not _starts(cls, f)}
    return st.fixed_dictionaries(needed, optional=drawn).map(functools.partial(_configured, cls))


def _sizes() -> set[str]:
    """Return the options of a soft prompt that are read from the model or not used for prompts."""
    return {f.name for f in dataclasses.fields(SequenceMethod)} - {"num_virtual_tokens"}


def _starts(cls: type[Method], field: dataclasses.Field[object]) -> bool:
    """Return whether a method can be made without this option."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return False
    try:
        cls()
    except PeftfxError as error:
        return error.where != field.name
    return True


def _configured(cls: type[Method], options: Mapping[str, object]) -> Method:
    try:
        return cls.from_options(options)
    except PeftfxError:  # these options contradict each other, and the method says so
        reject()


def _values(name: str, hint: object) -> st.SearchStrategy[object] | None:
    """Return a strategy for a field's values from its name and type, or None for its default."""
    if "dropout" in name:
        return st.sampled_from((0.0, 0.5))
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(1, 4)
    if hint is float:
        return st.sampled_from((0.5, 1.0, 3.0))
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        drawn = [_values(name, h) for h in typing.get_args(hint) if h is not type(None)]
        choices = [values for values in drawn if values is not None]
        return st.one_of(*choices) if choices else None
    return None


@functools.cache
def places(spec: Spec, method: Method) -> tuple[str, ...]:
    """Return a target for each site, and for each part of a fused site, where this method can act."""
    found = []
    for site in captured(spec).graph.sites:
        if acts_at(method, spec, site):
            found.append(site.path)
            if isinstance(method, WeightMethod):  # others act at whole modules
                found += [f"{site.path} & {part.role}" for part in site.parts]
    return tuple(found)


def acts_at(method: Method, spec: Spec, site: Site) -> bool:
    """Return whether a method can start at a site; some kinds of sites refuse some options."""
    return site.kind in method.kinds and _can_start(method, spec, site)


@functools.singledispatch
def _can_start(method: Method, spec: Spec, site: Site) -> bool:
    return False


@_can_start.register
def _(method: AttentionMethod, spec: Spec, site: AttentionSite) -> bool:
    return site.heads is not None


@_can_start.register
def _(method: PatternMethod, spec: Spec, site: PatternSite) -> bool:
    return method.acts_at(site)


@_can_start.register
def _(method: OverrideMethod, spec: Spec, site: Site) -> bool:
    return bool(copies_of(captured(spec).model, method, site))


@_can_start.register
def _(method: WeightMethod, spec: Spec, site: WeightSite) -> bool:
    rng, model, placement = torch.Generator(), captured(spec).model, WeightPlacement(method.at(site), site)
    try:
        rule = Placed(method, Placements([placement]))
        shared = shared_by(rule, model, rng)
        placement.init(model, rng, {n: shared[kept] for n, kept in rule.reads(placement, shared).items()})
    except PeftfxError:
        return False
    return True


@st.composite
def cases(
    draw: st.DrawFn,
    cls: type[Method],
    choices: Choices | None = None,
    pool: Sequence[Spec] = POOL,
    least: int = 1,
) -> tuple[Case, Method]:
    """Draw a case, and a method whose target picks at least `least` places in the case's model."""
    if issubclass(cls, SequenceMethod):
        case, prompt = draw(_calls(PROMPTED if pool[0].sizes() is None else pool)), draw(configs(cls, choices))
        if not _fits(case.spec, prompt):
            reject()
        return case, prompt
    if issubclass(cls, AttentionMethod):
        pool = [spec for spec in pool if repr(spec).count("AttentionBlock(") >= least]
    case, method = draw(_calls(pool)), draw(configs(cls, choices))
    saved = draw(st.sampled_from((None, None, ("head",)))) if case.spec.sizes() is None else None
    found = [place for place in places(case.spec, method) if saved is None or place != "head"]
    if len(found) < least or method.obstacle is not None:
        reject()
    target = tuple(draw(st.lists(st.sampled_from(found), min_size=least, max_size=4, unique=True)))
    return case, dataclasses.replace(method, target=target, modules_to_save=saved)


def _fits(spec: Spec, method: Method) -> bool:
    """Return whether a soft prompt can act in a model."""
    try:
        prompt_placement(method, captured(spec).model, captured(spec).graph.sites)  # type: ignore[arg-type]
    except PeftfxError:
        return False
    return True


@st.composite
def _calls(draw: st.DrawFn, pool: Sequence[Spec]) -> Case:
    spec = draw(st.sampled_from(pool))
    batch, sequence = spec.sizes() or (draw(st.integers(1, 3)), draw(st.integers(1, 5)))
    return Case(spec, batch, sequence, draw(st.integers(0, 9)))
