"""Counts of where the tensors of an adapter's file went. They add up to all tensors in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum

from peftfx.adapters.adapter import Adapter, shared_key
from peftfx.contract.override import SAVED
from peftfx.contract.placed import Placed
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.passes.adaptation.pattern_weights import foldable
from peftfx.passes.base import attributes_of
from peftfx.sites.site import SEQUENCE


class Destination(StrEnum):
    """A place where a tensor of an adapter's file went, in the words of reports."""

    MERGED = "merged into weights"
    CONSTANTS = "made constants"
    APART = "left apart"
    COPIES = "trained copies"
    ROWS = "in the rows' stacks"
    SLOTS = "put into slots"
    PROMPTS = "prompts"
    NOT_RUN = "not run here"
    REPEATS = "repeats of the base"
    UNUSED = "never run"


def count_tensors(adapters: Mapping[str, Adapter], graphs: Sequence[Graph], to: str) -> dict[str, int]:
    """Count how many tensors of the adapters' files went to each destination. For a new adapter, count its state.

    Args:
        adapters: the adapters, by name.
        graphs: the exported graphs, with the adapters in them, before a merge.
        to: the destination of the tensors that the graphs read: `Destination.MERGED`, `Destination.APART` or
            `Destination.SLOTS`.
    """
    read = {target for graph in graphs for target in attributes_of(graph) if target.startswith(f"{ADAPTERS}.")}
    own = {name: {t.split(".", 2)[2] for t in read if t.startswith(f"{ADAPTERS}.{name}.")} for name in adapters}
    folds = [match.region for graph in graphs if to == Destination.MERGED for match in foldable(graph)[0]]
    folded = {target.removeprefix(f"{ADAPTERS}.") for region in folds for _, target in region.params}
    return _count(adapters, own, to, folded)


def count_row_tensors(adapters: Mapping[str, Adapter], graphs: Sequence[Graph]) -> dict[str, int]:
    """Count tensors by destination for a batched export, whose graphs read all `adapters` in one stack."""
    runs = {path for graph in graphs for path in graph.sites.running}
    return _count(adapters, {name: set(_acting(adapter, runs)) for name, adapter in adapters.items()}, Destination.ROWS)


def _acting(adapter: Adapter, runs: Collection[str]) -> Iterator[str]:
    """Yield the keys of an adapter's tensors that act at modules which run."""
    for placement in adapter.placements:
        if placement.site.path in runs:
            yield from adapter.keys(placement).values()
    for override in adapter.overrides:
        if any(o.key.removeprefix(f"{SAVED}.").rpartition(".")[0] in runs for o in override.by_each_name()):
            yield override.key


def _count(
    adapters: Mapping[str, Adapter],
    read: Mapping[str, Collection[str]],
    to: str,
    folded: Collection[str] = (),
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, adapter in adapters.items():
        for number, rule in enumerate(adapter.placed):
            beside = {key for key in _keys(adapter, rule, number) if f"{name}.{key}" not in folded}
            counts.update(_where(rule, key, read[name], to, beside) for key in _keys(adapter, rule, number))
            account = adapter.accounts.get(number)
            counts.update(
                {Destination.REPEATS: len(account.repeats), Destination.UNUSED: len(account.unused)} if account else {}
            )
    return {place: count for place, count in counts.items() if count}


def _keys(adapter: Adapter, rule: Placed, number: int) -> Iterator[str]:
    """Yield the keys in the adapter of all tensors that the file of one of its rules holds."""
    if number in adapter.accounts:
        yield from adapter.accounts[number].taken.values()
        return
    for placement in rule.placements:
        yield from (f"{placement.key}.{name}" for name in placement.suffixes())
    yield from (override.key for override in rule.overrides)
    yield from (shared_key(number, name) for name in rule.method.shared_keys(rule.sites))


def _where(rule: Placed, key: str, read: Collection[str], to: str, beside: Collection[str]) -> str:
    if rule.placements.prompts and key.partition(".")[0] == SEQUENCE:
        return Destination.PROMPTS
    if key not in read:
        return Destination.NOT_RUN
    if to in (Destination.ROWS, Destination.SLOTS):
        return to
    if key.startswith(f"{SAVED}."):
        return Destination.COPIES
    if rule.method.unfoldable:
        return Destination.APART
    constant = rule.placements.attentions or (rule.placements.patterns and key in beside)
    return Destination.CONSTANTS if to == Destination.MERGED and constant else to
