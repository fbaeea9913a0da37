"""Splice what methods compute into a graph: tag the new nodes, and let readers use them in place of the old values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import fx

from peftfx.adapters.adapter import Adapter
from peftfx.contract.placement import Placement, WeightPlacement
from peftfx.errors import PeftfxError
from peftfx.generation.invocation import ACTIVE, OFFSETS, TOKEN_IDS, active
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.graph.rewriter import REGION, REPLACES, Cursor, Rewriter
from peftfx.passes.base import Region, attributes_of, fake_like, results
from peftfx.sites.site import Site

_S = TypeVar("_S", bound=Site)


class Splicer:
    """One insertion in progress: the graph's nodes, and what now replaces each call's output.

    Attributes:
        nodes: the nodes, by name.
        latest: the node that now replaces a node, by the replaced node's name.
        weighted: the same, only for methods that act on weights. They come before results that are added to the output
            from elsewhere.
        instead: the result that directly replaced a node, by the node's name.
        invocations: the nodes that say where an invocation in the text switches a method on, by the invocation's
            tokens.
        placed: the placements at each site, by the names of their adapters and their keys, in order.
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
        self.invocations: dict[tuple[int, ...], fx.Node] = {}
        self.placed: dict[str, dict[tuple[str, str], WeightPlacement]] = {}
        for result in results(graph):
            region = result.meta[REGION]
            self.latest[region.y] = self.instead[result.meta[REPLACES]] = result
            if placement := region.placement.on_weight:
                self.weighted[region.y] = result
                self.note(region.adapter, placement)

    def called(self, site: _S) -> _S:
        """Return a site of the graph, and refuse a site without calls.

        Raises:
            PeftfxError: nothing calls the site any more, so an adapter there would be lost.
        """
        if not site.calls:
            what = "a pass took the calls of this site out of the graph: what acts there would be lost"
            raise PeftfxError(what, site.path, "put adapters in ahead of Fuse, Sweep and Open")
        return site

    def note(self, adapter: str, placement: WeightPlacement) -> None:
        """Record that a placement of this adapter acts at its site."""
        self.placed.setdefault(placement.site.path, {})[adapter, placement.key] = placement

    def parameters(self, placement: Placement, name: str, adapter: Adapter, anchor: fx.Node) -> dict[str, fx.Node]:
        """Return the nodes that read a placement's parameters, by the parameters' names."""
        keys = adapter.keys(placement).items()
        like = anchor.meta["val"]
        return {n: self.attribute(f"{ADAPTERS}.{name}.{key}", fake_like(like, adapter.get(key))) for n, key in keys}

    def invocation(self, placement: Placement, region: Region) -> dict[str, fx.Node]:
        """Return the node that says where a method acts after its invocation; shared by all its places.

        Raises:
            PeftfxError: the graph has no token ids.
        """
        tokens = placement.method.invoked_by
        if tokens and tokens not in self.invocations:
            inputs = [node for node in self.rewriter.graph.nodes if node.op == "placeholder"]
            named = {spec.name: node for spec, node in zip(self.graph.inputs, inputs, strict=True)}
            if TOKEN_IDS not in named:
                what = "an aLoRA acts behind its invocation tokens, and no input_ids reach this graph"
                raise PeftfxError(what, placement.site.path, "give inputs= with input_ids, in place of embeddings")
            ids, offsets = named[TOKEN_IDS], named.get(OFFSETS)
            if offsets is not None and not offsets.users:  # its length is not yet known to be the batch's
                self.rewriter.revalue(offsets, ids.meta["val"][:, 0])
            first = next(n for n in self.rewriter.graph.nodes if n.op not in ("placeholder", "get_attr"))
            function = functools.partial(active, tokens=tokens)
            self.invocations[tokens] = self.rewriter.before(first, region=region).trace(
                function, ids, offsets, key=("active", tokens), what=ACTIVE, where=TOKEN_IDS
            )
        return {ACTIVE: self.invocations[tokens]} if tokens else {}

    def region(self, placement: Placement, name: str, y: fx.Node, params: Mapping[str, fx.Node]) -> Region:
        """Make the tag of what a placement adds at `y`."""
        return Region(name, placement, y.name, tuple((n, str(node.target)) for n, node in params.items()))

    def replace(self, y: fx.Node, result: fx.Node, users: Iterable[fx.Node]) -> None:
        """Let these users of `y` read a region's result instead of `y`."""
        for user in users:
            user.replace_input_with(y, result)
        later = self.instead.pop(y.name, None)
        if later is not None:  # this result was added to `y`; now it is added to the new result
            self.rewriter.tag(later, replaces=result.name)
            self.instead[result.name] = later
        self.rewriter.tag(result, replaces=y.name)
        self.instead[y.name] = result
        for name in (y.name, result.meta[REGION].y):
            if self.latest.get(name, y) is y:
                self.latest[name] = result

    def at(self, before: fx.Node, like: fx.Node, region: Region) -> Cursor:
        """Return the cursor for a region's nodes: before a node, as code of the module that made `like`."""
        return self.rewriter.before(before, like, region=region)

    def attribute(self, target: str, value: object, **tags: object) -> fx.Node:
        """Return the `get_attr` node for a target."""
        self.attributes[target] = self.rewriter.attribute(target, value, **tags)
        return self.attributes[target]
