"""Remove adapters from a graph. The result is the graph into which they were inserted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from peftfx.adapters.adapter import Adapter
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.graph.rewriter import OVERRIDES, REGION, REPLACES, Rewriter
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.base import Pass, PassResult, attributes_of, results


@dataclass(frozen=True)
class Remove(Pass):
    """Undo the insertions and overrides of one adapter, or of all adapters.

    Attributes:
        name: the name of the adapter; None means all adapters.
    """

    name: str | None = None
    requires = ("intact",)

    @property
    def ensures(self) -> tuple[str, ...]:  # type: ignore[override]
        """The property `bare` if all adapters are removed."""
        return ("bare",) if self.name is None else ()

    def __call__(self, graph: Graph) -> PassResult:
        if self.name is not None and self._is_run_again(graph):
            return self._without(graph)
        graph = graph.clone()
        rewriter = Rewriter(graph.module.graph)
        nodes = {n.name: n for n in graph.nodes()}
        stands_for: dict[str, str] = {}
        changed = 0
        for result in results(graph):
            replaced = stands_for.get(result.meta[REPLACES], result.meta[REPLACES])
            rewriter.tag(result, replaces=replaced)
            if self._mine(result.meta[REGION].adapter):
                result.replace_all_uses_with(nodes[replaced])
                stands_for[result.name] = replaced
                changed += 1
        gone = self._take_calls(graph, nodes)
        for node in reversed(list(graph.nodes())):
            if REGION in node.meta and (self._mine(node.meta[REGION].adapter) or node.meta[REGION].y in gone):
                graph.module.graph.erase_node(node)
        changed += self._restore(graph)
        graph.module.recompile()
        return PassResult(graph, changed)

    def _is_run_again(self, graph: Graph) -> bool:
        """Say whether another adapter runs this adapter again after its own step: see `WeightMethod.reruns`."""
        own = [n for t, n in attributes_of(graph).items() if t.startswith(f"{ADAPTERS}.{self.name}.")]
        users = (user for node in own for user in node.users if REGION in user.meta)
        return any(user.meta[REGION].adapter != self.name for user in users)

    def _without(self, graph: Graph) -> PassResult:
        """Return the graph with all other adapters inserted again, in order."""
        acting = [result.meta[REGION].adapter for result in results(graph)]
        names = dict.fromkeys([*acting, *(t.split(".")[1] for t in attributes_of(graph) if t.startswith(ADAPTERS))])
        removed = Remove()(graph)
        left = removed.graph
        for name in names:
            if name != self.name:
                adapter = left.module.get_submodule(f"{ADAPTERS}.{name}")
                assert isinstance(adapter, Adapter)
                left = Insert(name, adapter)(left).graph
        return PassResult(left, removed.changed)

    def _mine(self, adapter: str) -> bool:
        return self.name in (None, adapter)

    def _take_calls(self, graph: Graph, nodes: Mapping[str, fx.Node]) -> set[str]:
        """Remove the calls that the adapter added to sites. Return their outputs, whose insertions go, too."""
        gone: set[str] = set()
        sites = []
        for site in graph.sites:
            added = [
                c for c in site.calls if REGION in nodes[c.op].meta and self._mine(nodes[c.op].meta[REGION].adapter)
            ]
            gone.update(call.y for call in added)
            kept = tuple(c for c in site.calls if c not in added)
            sites.append(dataclasses.replace(site, calls=kept) if added else site)
        graph.sites = dataclasses.replace(graph.sites, items=tuple(sites)) if gone else graph.sites
        return gone

    def _restore(self, graph: Graph) -> int:
        """Read the base's tensors again in place of the adapter's, and remove the adapter's tensors."""
        attributes = attributes_of(graph)
        changed = 0
        for target, node in attributes.items():
            if not target.startswith(f"{ADAPTERS}.") or not self._mine(target.split(".")[1]):
                continue
            if OVERRIDES in node.meta:
                node.replace_all_uses_with(attributes[node.meta[OVERRIDES]])
                changed += 1
            for whole in list(node.users):  # the base's tensor with some rows of the adapter
                (under, *_) = whole.all_input_nodes
                whole.replace_all_uses_with(under)
                graph.module.graph.erase_node(whole)
                changed += 1
            graph.module.graph.erase_node(node)
        return changed
