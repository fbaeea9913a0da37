"""Links: the connections between the sites of a graph, found in one forward pass over the nodes.

A site's output has only that site as its origin. Where values of different sites are added, the sum is a *join*, which
is the only origin of all later values. So no node has many origins, and the pass is linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from peftfx.analysis.dataflow import SUMS, op_name
from peftfx.analysis.weight_ops import module_path
from peftfx.graph.graph import Graph
from peftfx.sites.dataflow import INPUT, JOIN, OUTPUT, Dataflow, Junction, Link
from peftfx.sites.site import Call, Site

_MANY = 16  #: a value with more origins than this becomes a join
_SIZES = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)

Origins = Mapping[int, tuple[str, ...]]
"""Numbers of the network's nodes, each with the operators on the way from the node."""


def find_links(graph: Graph, sites: Sequence[Site]) -> Dataflow:
    """Return the connections between the `sites` of a base graph."""
    reader = _Reader(graph, sites)
    for node in graph.nodes():
        reader.read(node)
    return reader.dataflow()


@dataclass
class _Reader:
    """The origins of each node so far, and the links found so far."""

    graph: Graph
    sites: Sequence[Site]
    origins: dict[str, Origins] = field(default_factory=dict)
    junctions: list[Junction] = field(default_factory=list)
    links: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ops: dict[str, list[tuple[int, Call]]] = {}
        self.ends: dict[str, int] = {}
        for number, site in enumerate(self.sites):
            for call in site.calls:
                self.ops.setdefault(call.op, []).append((number, call))
                self.ends[call.op] = self.ends[call.y] = number

    def read(self, node: fx.Node) -> None:
        """Record where a node's value comes from, and the links that end at the node."""
        for number, call in self.ops.get(node.name, ()):
            beside = [n.name for n in node.all_input_nodes] if call.key else []  # an attention's mask or bias
            for operand in dict.fromkeys((call.x, call.key, call.value, *beside)):
                self._link(self.origins.get(operand, {}), number)
        if node.op == "placeholder":
            self.origins[node.name] = {self._junction(Junction(node.name, INPUT)): ()}
        elif node.name in self.ends:
            self.origins[node.name] = {self.ends[node.name]: ()}
        elif node.op == "output":
            self._read_outputs(node)
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), _SIZES):
            self.origins[node.name] = self._through(node)

    def dataflow(self) -> Dataflow:
        """Return the links from inputs and sites to sites and outputs, and the joins between them."""
        before: dict[int, list[int]] = {}
        for source, target in self.links:
            before.setdefault(target, []).append(source)
        first = len(self.sites)
        ends = [first + i for i, junction in enumerate(self.junctions) if junction.kind == OUTPUT]
        used, waiting = set(range(first)), [*range(first), *ends]
        used.update(ends)
        while waiting:
            for source in before.get(waiting.pop(), ()):
                if source not in used:
                    used.add(source)
                    waiting.append(source)
        numbers = {old: new for new, old in enumerate(sorted(used))}
        kept = tuple(j for i, j in enumerate(self.junctions) if first + i in used)
        links = (
            Link(numbers[a], numbers[b], ops) for (a, b), ops in self.links.items() if a in numbers and b in numbers
        )
        return Dataflow(kept, tuple(links))

    def _through(self, node: fx.Node) -> Origins:
        name = op_name(node)
        inputs = [found for n in node.all_input_nodes if (found := self.origins.get(n.name))]
        merged = _merged(inputs)
        if len(merged) > _MANY or (name in SUMS and self._joins(inputs)):
            join = self._junction(Junction(node.name, JOIN, module_path(node)))
            self._link({origin: _with(ops, name) for origin, ops in merged.items()}, join)
            return {join: ()}
        return {origin: _with(ops, name) for origin, ops in merged.items()}

    def _joins(self, inputs: Sequence[Origins]) -> bool:
        """Return whether values of several sites meet, and no value includes the others' origins, inputs aside."""
        sets = [frozenset(origin for origin in found if not self._is_input(origin)) for found in inputs]
        return not any(all(other <= one for other in sets) for one in sets) if sets else False

    def _is_input(self, number: int) -> bool:
        junction = number - len(self.sites)
        return junction >= 0 and self.junctions[junction].kind == INPUT

    def _read_outputs(self, node: fx.Node) -> None:
        for name, value in zip(self.graph.outputs, node.args[0], strict=True):  # type: ignore[arg-type]
            if isinstance(value, fx.Node) and self.origins.get(value.name):
                self._link(self.origins[value.name], self._junction(Junction(name, OUTPUT)))

    def _junction(self, junction: Junction) -> int:
        self.junctions.append(junction)
        return len(self.sites) + len(self.junctions) - 1

    def _link(self, origins: Origins, target: int) -> None:
        for origin, ops in origins.items():
            if origin != target:
                self.links[origin, target] = _union(self.links.get((origin, target), ()), ops)


def _merged(inputs: Iterable[Origins]) -> dict[int, tuple[str, ...]]:
    merged: dict[int, tuple[str, ...]] = {}
    for found in inputs:
        for origin, ops in found.items():
            merged[origin] = _union(merged.get(origin, ()), ops)
    return merged


def _union(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return other if not one else one if one == other else tuple(dict.fromkeys((*one, *other)))


def _with(ops: tuple[str, ...], name: str) -> tuple[str, ...]:
    return ops if name in ops else (*ops, name)
