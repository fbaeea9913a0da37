"""The effect of a pattern method on weights: which layers' weights it changes, and whether that is its whole effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from peftfx.contract.completeness import asking, refuse_folded
from peftfx.contract.method import Base
from peftfx.contract.pattern import PatternMethod
from peftfx.contract.placed import Placements
from peftfx.contract.placement import PatternPlacement
from peftfx.contract.update import Update
from peftfx.contract.weight import widened
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.recipe import Get
from peftfx.graph.rewriter import REGION, REPLACES
from peftfx.passes.adaptation.pattern import unnamed
from peftfx.passes.base import Region, results
from peftfx.sites.blocks import turned
from peftfx.sites.site import PatternSite, WeightSite

_Slot = Literal["weight", "bias"]


@dataclass(frozen=True)
class HeldWeight:
    """An argument of a pattern's function that is a layer's weight or bias at a match."""

    name: str
    site: WeightSite
    slot: _Slot


class Elsewhere(Exception):
    """Raised when the effect of a method at a match is not all in the weights there.

    Args:
        path: the path of the match.
        why: where else the effect is.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


@dataclass(frozen=True)
class MatchStep:
    """A pattern method applied to one layer's weight and bias, with the names of its parameters in the graph."""

    method: PatternMethod
    site: PatternSite
    held: tuple[HeldWeight, ...]
    params: Mapping[str, str]
    by_row: ClassVar[None] = None  #: a pattern's weight may be an argument of any shape

    def fold(self, start: Base, base: Base, get: Get) -> Base:
        """Return the weight and bias after this step, given the current ones in `base`."""
        p = widened({name: get(target) for name, target in self.params.items()})
        weight, bias = base
        for held in self.held:
            if held.slot == "bias" and bias is not None:
                bias = self._folded(held.name, bias, p)
            elif held.slot == "weight":
                stored = turned(weight, held.site.transposed)  # as the pattern's function reads it
                weight = turned(self._folded(held.name, stored, p), held.site.transposed)
        return Base(weight, bias)

    def update(self, base: Base, get: Get) -> Update:
        """Return the same effect as scales and a low-rank sum, with the new bias if it changes."""
        p = widened({name: get(target) for name, target in self.params.items()})
        made = Update()
        for held in self.held:
            if held.slot == "bias" and base.bias is not None:
                made = dataclasses.replace(made, bias=self._folded(held.name, base.bias, p))
            elif held.slot == "weight":
                with asking(self.method, "update", self.site.path):
                    own = self.method.update(unnamed(self.site), held.name, p)
                made = made.then(own.turned() if held.site.transposed else own)
        return made

    def _folded(self, name: str, weight: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        with asking(self.method, "fold", self.site.path):
            made = self.method.fold(unnamed(self.site), name, weight, p)
        refuse_folded(self.method, self.site.path, name, made, weight)
        return made


@dataclass(frozen=True)
class Folds:
    """An inserted pattern method whose whole effect is in the weights of layers.

    Attributes:
        region: the region of its first call.
        held: the weights and biases that it changes.
    """

    region: Region
    held: tuple[HeldWeight, ...]

    def covers(self, region: Region) -> bool:
        """Say whether a region belongs to a call of this method at this match."""
        return (region.adapter, region.placement) == (self.region.adapter, self.region.placement)

    def steps(self) -> Iterator[tuple[WeightSite, MatchStep]]:
        """Yield each layer, and the step at the layer."""
        layers = {held.site.path: held.site for held in self.held}
        for placement in Placements([self.region.placement]).patterns:
            for path, site in layers.items():
                own = tuple(held for held in self.held if held.site.path == path)
                yield site, MatchStep(placement.method, placement.site, own, dict(self.region.params))


def foldable(graph: Graph) -> tuple[list[Folds], list[Elsewhere]]:
    """Find the inserted pattern methods whose whole effect is in weights, in the order in which they apply.

    Returns:
        These methods, and for each other method the reason why it is not in the weights.
    """
    found: list[Folds] = []
    beside: list[Region] = []
    why: list[Elsewhere] = []
    for region in (result.meta[REGION] for result in results(graph)):
        if region.placement.on_weight is not None or any(own.covers(region) for own in found):
            continue
        for placement in Placements([region.placement]).patterns:
            try:
                found.append(Folds(region, held_weights(graph, placement, beside)))
            except Elsewhere as reason:
                why.append(reason)
        if not found or not found[-1].covers(region):
            beside.append(region)
    return found, why


def refuse_unfolded(graph: Graph) -> None:
    """Refuse to merge a graph with an inserted pattern method whose effect is not all in weights.

    Raises:
        PeftfxError: there is such a method; the message has the reason.
    """
    _, why = foldable(graph)
    if why:
        what = f"what is added at a pattern has no place in the base's weights: {why[0].why}"
        hint = "export it: there its parameters become constants; or make adapters of weights alone active"
        raise PeftfxError(what, why[0].path, hint)


def held_weights(graph: Graph, placement: PatternPlacement, beside: Sequence[Region]) -> tuple[HeldWeight, ...]:
    """Return the weights and biases of layers that hold the whole effect of a method at a match.

    Args:
        graph: the graph, with or without adapters.
        placement: the method at the match.
        beside: the insertions that act before the method and are in no weight.

    Raises:
        Elsewhere: the effect is not all in weights.
    """
    method, path = placement.method, placement.site.path
    site = next((s for s in graph.sites.patterns if s.path == path), None)
    if site is None:
        raise Elsewhere(path, "the call that the model was transformed with does not run it")
    with asking(method, "folds", path):
        names = method.folds(unnamed(site))
    if not names:
        raise Elsewhere(path, f"{type(method).__name__}.folds names no arguments of {site.pattern}")
    inner = {node.name for node in _inner(graph, site)}
    other = next((region.placement for region in beside if region.y in inner), None)
    if other is not None:
        raise Elsewhere(path, f"{type(other.method).__name__} acts within it, and is in no weight")
    return tuple(_held(graph, site, name, inner) for name in names)


def _held(graph: Graph, site: PatternSite, name: str, inner: Collection[str]) -> HeldWeight:
    operand = site.operand(name)
    for layer in graph.sites.weights if operand.weight else ():
        inside = [call.op in inner for call in layer.calls]
        if operand.weight in (layer.weight, layer.bias) and any(inside):
            if not all(inside):
                raise Elsewhere(site.path, f"{layer.path}, of which {name} is the weight, runs elsewhere too")
            return HeldWeight(name, layer, "weight" if operand.weight == layer.weight else "bias")
    raise Elsewhere(site.path, f"its {name} is the weight of no layer")


def _inner(graph: Graph, site: PatternSite) -> set[fx.Node]:
    """Return the base's own nodes that compute a match, from its first argument to its value, in all calls."""
    nodes = {node.name: node for node in graph.nodes()}
    found: set[fx.Node] = set()
    for call in site.calls:
        x, todo = nodes[call.x], [nodes[call.y]]
        while todo:
            node = todo.pop()
            while REPLACES in node.meta:  # without inserted methods
                node = nodes[node.meta[REPLACES]]
            if node is not x and node not in found and node.op == "call_function":
                found.add(node)
                todo += node.all_input_nodes
    return found
