"""The memory of copied layers: copied nodes have the values of a traced layer, but lie in memory of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, fx

from peftfx.graph.capturing.layer_kinds import LayerCall, Unknown
from peftfx.graph.written import Memory, memory_of, memory_of_tensor


def refuse_views(call: LayerCall, exits: Sequence[object]) -> None:
    """Refuse a layer that returns a view of another result or of an argument: a copied layer's would be no view.

    Raises:
        Unknown: it does.
    """
    held = {part for tensor in call.entries.values() for part in memory_of_tensor(tensor)}
    results = {id(v): v for v in exits if isinstance(v, Tensor) and call.label(v) is None}
    for result in results.values():
        own = memory_of_tensor(result).keys()
        if own & held:
            raise Unknown
        held |= own


def memories_of_copies(
    copies: Mapping[fx.Node, fx.Node],
    exits: Iterable[tuple[object, object]],
    entries: Iterable[tuple[fx.Node, fx.Node]],
) -> Iterator[tuple[fx.Node, Memory]]:
    """Yield each copied node and its memory.

    Args:
        copies: the copies, by the traced node.
        exits: what the traced layer returned, and what its copy returns in this place.
        entries: nodes that the traced layer read, and those that its copy reads.
    """
    known: dict[int, Memory] = {}
    for leaf, made in exits:
        if isinstance(leaf, Tensor) and isinstance(made, Tensor):
            known |= dict.fromkeys(memory_of_tensor(leaf), memory_of_tensor(made))
    for node, own in entries:
        known |= dict.fromkeys(memory_of(node), memory_of(own))
    for node, copy in copies.items():
        memory: dict[int, object] = {}
        for part in memory_of(node):
            if part not in known:
                fresh = object()
                known[part] = {id(fresh): fresh}
            memory |= known[part]
        yield copy, memory
