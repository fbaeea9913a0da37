"""Adapters made of other adapters: a weighted sum (HF PEFT's `add_weighted_adapter`), or one task of several."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from peftfx.adapters.adapter import UNKNOWN, Adapter
from peftfx.bases.guests import own_modules
from peftfx.contract.combination import Combination
from peftfx.contract.method import PLACING, Method, Params
from peftfx.contract.placed import Placed, Placements
from peftfx.contract.placement import WeightPlacement
from peftfx.contract.weight import Weighted, WeightMethod
from peftfx.errors import PeftfxError, how_many, listed, shown, warn
from peftfx.field_types import fits

TOKEN_ROWS = "trainable_token_indices"  #: the option of a method that trains rows of embeddings beside its own tensors


def settled(adapter: Adapter, values: Mapping[str, int]) -> Adapter:
    """Return an adapter with the same tensors that does for all rows what `adapter` does for rows with these `values`.

    Args:
        adapter: the adapter whose methods read inputs of the call (`Method.inputs`).
        values: the value of each input to fix, by the input's name.
    """
    placed = []
    for rule in adapter.placed:
        own = {name: value for name, value in values.items() if name in rule.method.inputs}
        places = (dataclasses.replace(p, method=p.method.settled(own)) for p in rule.placements)
        placed.append(dataclasses.replace(rule, method=rule.method.settled(own), placements=Placements(places)))
    made = Adapter(placed)
    made.records, made.named, made.ran = dict(adapter.records), adapter.named, adapter.ran
    made.start = adapter.start
    trained = {name for name, _ in adapter.named_parameters()}
    for name, value in adapter.tensors():
        made.put(name, value.detach(), trained=name in trained)
    for placement in adapter.placements:
        own = {name: value for name, value in values.items() if name in placement.method.inputs}
        for name, value in placement.method.settle(adapter.all_of(placement), own).items():
            key = f"{placement.key}.{name}"
            made.put(key, value.detach(), trained=key in trained)
    return made


@torch.no_grad()
def combine(
    base: nn.Module, adapters: Mapping[str, Adapter], weights: Sequence[float], how: str | Combination
) -> Adapter:
    """Return one adapter that is the weighted sum of the adapters of these names.

    The sum acts wherever one of the adapters acts. A trained copy of a tensor of the base has no weight: the copy is
    kept if only one of the adapters has one.

    Args:
        base: the base of all adapters.
        adapters: the adapters by name.
        weights: a factor for each adapter, in the order of `adapters`.
        how: HF PEFT's combination type, or a `Combination` with options. Each method defines its own combinations.

    Raises:
        PeftfxError: a method has no such sum, two methods meet at one placement, or two adapters train one tensor.
    """
    if not fits(weights, Sequence[float]):
        raise PeftfxError(f"weights are numbers, not {shown(weights)}", "weights", "give one for each adapter")
    if not adapters or len(adapters) != len(weights):
        what = f"{how_many(len(adapters), 'adapter')} and {how_many(len(weights), 'weight')}"
        raise PeftfxError(what, "weights", "give a weight for each adapter")
    ranks = [getattr(m, "r", 0) for a in adapters.values() for m in (*a.rules, *(p.method for p in a.placements))]
    asked = how if isinstance(how, Combination) else Combination(combination_type=how)
    combination = asked.of(len(adapters), max(ranks, default=0))
    _refuse_copies(adapters)
    meeting = _meeting(adapters)
    found: dict[str, list[tuple[WeightPlacement, Weighted]]] = {}
    for (name, adapter), weight in zip(adapters.items(), weights, strict=True):
        for placement, params in _places(base, name, adapter, meeting):
            found.setdefault(placement.key, []).append((placement, Weighted(weight, placement.method, params)))
    made: dict[type[WeightMethod], list[tuple[WeightPlacement, WeightMethod, Params]]] = {}
    order = {path: i for i, (path, _) in enumerate(own_modules(base))}  # the order in which HF PEFT draws at random
    for key, given in sorted(found.items(), key=lambda item: order.get(item[1][0][0].site.path, len(order))):
        first, classes = given[0][0], {type(w.method) for _, w in given}
        if len(classes) > 1:
            what = f"{' and '.join(sorted(c.__name__ for c in classes))} cannot be summed"
            raise PeftfxError(what, key, "make both active instead: set_adapter([...]), or --adapter without weights")
        (cls,) = classes
        made.setdefault(cls, []).append((first, *cls.combined(first.view, combination, [w for _, w in given])))
    values: dict[str, Params] = {}
    rules: dict[tuple[type[Method], object], list[WeightPlacement]] = {}
    for cls, own in made.items():
        given_once = {method.of_file() for _, method, _ in own}
        for first, alone, params in own:
            method, values[first.key] = alone.alike(first.view, params, given_once)
            rules.setdefault((cls, method.of_file()), []).append(dataclasses.replace(first, method=method))
    return _made(base, adapters, list(rules.values()), values)


def tell_left_out(adapters: Mapping[str, Adapter]) -> None:
    """Warn of the tensors in these adapters' files that no call runs, because the sum leaves them out."""
    for name, adapter in adapters.items():
        left = sorted({key for account in adapter.accounts.values() for key in account.unused})
        if left:
            warn(f"the sum leaves out tensors of {name!r} that no call of the model runs: {listed(left, 3)}")


def _made(
    base: nn.Module, adapters: Mapping[str, Adapter], rules: list[list[WeightPlacement]], values: Mapping[str, Params]
) -> Adapter:
    overrides = {o.key: (adapter, o) for adapter in adapters.values() for o in adapter.overrides}
    saved = tuple(sorted({o.module for _, o in overrides.values() if not o.rows})) or None
    tokens = {o.path: o.rows for _, o in overrides.values() if o.rows}
    holder = next(i for i, own in enumerate(rules) if not tokens or TOKEN_ROWS in own[0].method.options())
    placed = []
    for i, own in enumerate(rules):
        copies = [o for _, o in overrides.values()] if i == holder else []
        first = own[0].method
        options: dict[str, object] = {name: getattr(first, name) for name in first.options() if name not in PLACING}
        options |= {"target": tuple(_expression(p) for p in own), "modules_to_save": saved if i == holder else None}
        if tokens and i == holder:
            options[TOKEN_ROWS] = tokens
        placed.append(Placed(type(first).from_options(options), Placements(own), tuple(copies)))
    made = Adapter(placed, next(iter(adapters.values())).records)
    made.start = UNKNOWN if any(adapter.start for adapter in adapters.values()) else ""
    for placement in made.placements:
        for name, value in values[placement.key].items():
            trained = not placement.method.is_constant(name, value)
            made.put(f"{placement.key}.{name}", value.detach().clone(), trained=trained)
    made.share(base)
    made.copy_overridden(base)
    for key, (adapter, _) in overrides.items():
        made.get(key).copy_(adapter.get(key))
    return made


def _expression(placement: WeightPlacement) -> str:
    """Return a target that picks only the site, or the part of a site, of this placement."""
    path = f"/{re.escape(placement.site.path)}/"
    return path if placement.part is None else f"{path} & {placement.part.role}"


def _refuse_copies(adapters: Mapping[str, Adapter]) -> None:
    owners: dict[str, str] = {}
    for name, adapter in adapters.items():
        for override in adapter.overrides:
            if override.tied:
                what = "adapters with one copy for tied modules cannot be summed"
                raise PeftfxError(what, override.name, "train without it (ensure_weight_tying, modules_to_save)")
            if not override.module and not override.rows:
                raise PeftfxError(
                    "adapters that train the base's biases cannot be summed",
                    override.key.partition(".")[2],
                    "train without them (bias='none')",
                )
            if owners.setdefault(override.key, name) != name:
                what = (
                    f"{owners[override.key]!r} and {name!r} both train their own copy of this, and copies "
                    "cannot be summed"
                )
                raise PeftfxError(what, override.key.partition(".")[2], "combine adapters of which one has it")


def _meeting(adapters: Mapping[str, Adapter]) -> set[str]:
    """Return the paths of fused sites where one adapter acts on the whole and another on parts."""
    placements = [p for adapter in adapters.values() for p in adapter.placements.weights]
    return {p.site.path for p in placements if p.part} & {p.site.path for p in placements if p.part is None}


def _places(
    base: nn.Module, name: str, adapter: Adapter, meeting: set[str]
) -> Iterator[tuple[WeightPlacement, Params]]:
    """Yield an adapter's placements and parameters; parts become the whole at the sites in `meeting`."""
    groups: dict[str, list[WeightPlacement]] = {}
    if beside := adapter.placements.beside_weights:
        what = f"{type(beside[0].method).__name__} has no sum"
        raise PeftfxError(what, name, "make one of the adapters active at a time")
    for placement in adapter.placements.weights:
        groups.setdefault(placement.site.path, []).append(placement)
    for path, group in groups.items():
        if path in meeting:
            method, params = group[0].whole(base, {p: adapter.all_of(p) for p in group})
            yield dataclasses.replace(group[0], method=method, part=None), params
        else:
            yield from ((placement, adapter.params(placement)) for placement in group)
