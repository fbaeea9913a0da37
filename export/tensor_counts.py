"""Where the tensors of an adapter's file went: counts that add up to what is in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from peftfx.adapters.adapter import Adapter, shared_key
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.placement import SAVED, Placed
from peftfx.contract.sequence import SEQUENCE, SequenceMethod
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.passes.base import attributes_of

MERGED, CONSTANTS, APART, COPIES = "merged into weights", "made constants", "left apart", "trained copies"
PROMPTS, NOT_RUN, REPEATS, UNUSED = "prompts", "not run here", "repeats of the base", "never run"


def count_tensors(adapters: Mapping[str, Adapter], graphs: Sequence[Graph], *, merged: bool) -> dict[str, int]:
    """How many tensors of these adapters' files went where; of an adapter that is new, of the file that it would be.

    Args:
        adapters: by name.
        graphs: those that are exported, with the adapters in them, before anything is merged.
        merged: whether what acts on weights is merged into them.
    """
    read = {target for graph in graphs for target in attributes_of(graph) if target.startswith(f"{ADAPTERS}.")}
    counts: Counter[str] = Counter()
    for name, adapter in adapters.items():
        own = {target.split(".", 2)[2] for target in read if target.startswith(f"{ADAPTERS}.{name}.")}
        for number, rule in enumerate(adapter.placed):
            counts.update(_where(rule, key, own, merged=merged) for key in _keys(adapter, rule, number))
            account = adapter.accounts.get(number)
            counts.update({REPEATS: len(account.repeats), UNUSED: len(account.unused)} if account else {})
    return {place: count for place, count in counts.items() if count}


def _keys(adapter: Adapter, rule: Placed, number: int) -> Iterator[str]:
    """Where the adapter keeps what is in the file of one of its rules."""
    if number in adapter.accounts:
        yield from adapter.accounts[number].taken.values()
        return
    for placement in rule.placements:
        names = ("prompt",) if isinstance(placement.method, SequenceMethod) else placement.suffixes()
        yield from (f"{placement.key}.{name}" for name in names)
    yield from (override.key for override in rule.overrides)
    yield from (shared_key(number, name) for name in rule.method.shared_keys())


def _where(rule: Placed, key: str, read: Collection[str], *, merged: bool) -> str:
    if isinstance(rule.method, SequenceMethod) and key.partition(".")[0] == SEQUENCE:
        return PROMPTS
    if key not in read:
        return NOT_RUN
    if key.startswith(f"{SAVED}."):
        return COPIES
    if not merged:
        return APART
    return CONSTANTS if isinstance(rule.method, AttentionMethod) else MERGED
