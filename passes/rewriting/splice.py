"""Splicer: what methods compute put into a graph: tagged, and read in the place of what it adapts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import fx

from peftfx.adapters.adapter import Adapter
from peftfx.contract.placement import Placement, WeightPlacement
from peftfx.errors import PeftfxError
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.graph.rewriter import REGION, REPLACES, Cursor, Rewriter
from peftfx.passes.base import Region, attributes_of, fake_like, results
from peftfx.sites.site import Site

_S = TypeVar("_S", bound=Site)


class Splicer:
    """One insertion in progress: the graph's nodes, what stands for each call's output.

    Attributes:
        nodes: by name.
        latest: what stands for a node's value now, by the node's name.
        weighted: the same, of what acts on weights alone: it comes before what joins their output from elsewhere.
        instead: the result that took the place of a node, by the node's name.
        placed: what was placed at each site, with the name of its adapter, in order.
    """

    def __init__(self, graph: Graph, name: str, adapter: Adapter) -> None:
        self.graph, self.name, self.adapter = graph, name, adapter
        self.rewriter = Rewriter(graph.module.graph)
        self.nodes = {n.name: n for n in graph.nodes()}
        self.sites = dict(graph.sites.weights_by_path)
        self.attributes = attributes_of(graph)
        self.latest: dict[str, fx.Node] = {}
        self.weighted: dict[str, fx.Node] = {}
        self.instead: dict[str, fx.Node] = {}
        self.placed: dict[str, dict[tuple[str, str], WeightPlacement]] = {}
        for result in results(graph):
            region = result.meta[REGION]
            self.latest[region.y] = self.instead[result.meta[REPLACES]] = result
            if placement := region.placement.on_weight:
                self.weighted[region.y] = result
                self.note(region.adapter, placement)

    def called(self, site: _S) -> _S:
        """A site of the graph, which something calls.

        Raises:
            PeftfxError: nothing does any more: what acts there would be lost.
        """
        if not site.calls:
            what = "a pass took the calls of this site out of the graph: what acts there would be lost"
            raise PeftfxError(what, site.path, "put adapters in ahead of Fuse, Sweep and Open")
        return site

    def note(self, adapter: str, placement: WeightPlacement) -> None:
        """Remember that a placement of this adapter acts at its site."""
        self.placed.setdefault(placement.site.path, {})[adapter, placement.key] = placement

    def parameters(self, placement: Placement, name: str, adapter: Adapter, anchor: fx.Node) -> dict[str, fx.Node]:
        """The nodes that read a placement's parameters, by their names."""
        keys = adapter.keys(placement).items()
        like = anchor.meta["val"]
        return {n: self.attribute(f"{ADAPTERS}.{name}.{key}", fake_like(like, adapter.get(key))) for n, key in keys}

    def region(self, placement: Placement, name: str, y: fx.Node, params: Mapping[str, fx.Node]) -> Region:
        """The tag of what a placement adds at `y`."""
        return Region(name, placement, y.name, tuple((n, str(node.target)) for n, node in params.items()))

    def replace(self, y: fx.Node, result: fx.Node, users: Iterable[fx.Node]) -> None:
        """Let these users of `y` read a region's result in its place."""
        for user in users:
            user.replace_input_with(y, result)
        later = self.instead.pop(y.name, None)
        if later is not None:  # it joined `y` from elsewhere, and now joins the result
            self.rewriter.tag(later, replaces=result.name)
            self.instead[result.name] = later
        self.rewriter.tag(result, replaces=y.name)
        self.instead[y.name] = result
        for name in (y.name, result.meta[REGION].y):
            if self.latest.get(name, y) is y:
                self.latest[name] = result

    def at(self, before: fx.Node, like: fx.Node, region: Region) -> Cursor:
        """Where nodes of a region are made: before a node, as code of the module that made `like`."""
        return self.rewriter.before(before, like, region=region)

    def attribute(self, target: str, value: object, **tags: object) -> fx.Node:
        """The `get_attr` node for a target."""
        self.attributes[target] = self.rewriter.attribute(target, value, **tags)
        return self.attributes[target]
