"""ByRow: let each row of a batch have an adapter of its own, by a number that it comes with; -1 is none.

What adapters do at a linear layer is stacked, an entry for each of them behind one that changes nothing, and each row
takes its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from peftfx.capturing import isolated
from peftfx.derived import Get
from peftfx.errors import PeftfxError
from peftfx.graph import CONSTANTS, DERIVED, Graph, TensorSpec
from peftfx.passes.base import Pass, PassResult, attribute, attributes_of, fake_like
from peftfx.passes.updated import Acting, add_node, update_call
from peftfx.rowwise import IDS, PREFIXES
from peftfx.sites import Call, Site
from peftfx.slots import INNER, OUTER, OWN, PREFIX, A, B

aten = torch.ops.aten


@dataclass(frozen=True)
class Given:
    """A recipe that is a tensor."""

    value: Tensor = field(repr=False)

    def evaluate(self, get: Get) -> Tensor:
        """The tensor."""
        return self.value


@dataclass(frozen=True, eq=False)
class ByRow(Pass):
    """Let rows choose.

    Attributes:
        stacks: by a site's path and what is there: [adapters + 1, ...]; a bias is its path's `OWN`. That of `PREFIX`
            fills the hole of a view that was captured with prefixes by row.
    """

    stacks: Mapping[tuple[str, str], Tensor]

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        paths = {path for path, _ in self.stacks if path}
        with isolated(graph.base):
            rows = _Rows(new, self.stacks)
            sites = {site.path: site for site in new.sites if site.weight}
            for site in (site for path, site in sites.items() if path in paths):
                for call in site.calls:
                    rows.update(site, call)
            rows.fill()
        new.module.recompile()
        return PassResult(new, len(paths & sites.keys()))


class _Rows:
    """A graph in which rows get entries of their own."""

    def __init__(self, graph: Graph, stacks: Mapping[tuple[str, str], Tensor]) -> None:
        self.graph, self.stacks = graph, stacks
        self.nodes, self.attributes = {n.name: n for n in graph.nodes()}, attributes_of(graph)
        self.index = self._index()
        self.taken: dict[tuple[str, str], fx.Node] = {}

    def _index(self) -> fx.Node:
        """Which entry each row takes."""
        inputs = [n for n in self.graph.nodes() if n.op == "placeholder"]
        known = next((i for i, spec in enumerate(self.graph.inputs) if spec.name == IDS), None)
        ids = self._input(inputs[-1], inputs[0]) if known is None else inputs[known]
        first = next(n for n in self.graph.nodes() if n.op not in ("placeholder", "get_attr"))
        return add_node(first, first, aten.add.Tensor, ids, 1)

    def _input(self, last: fx.Node, first: fx.Node) -> fx.Node:
        spec, value = self.graph.inputs[0], first.meta["val"]
        mode = detect_fake_mode([value])
        assert mode is not None
        with self.graph.module.graph.inserting_after(last):
            node = self.graph.module.graph.placeholder(IDS)
        with mode:
            node.meta = {"val": torch.empty(value.shape[:1], dtype=torch.long, device=value.device)}
        self.graph.inputs = (*self.graph.inputs, TensorSpec(IDS, torch.long, spec.shape[:1]))
        return node

    def update(self, site: Site, call: Call) -> None:
        """Let the rows of one call have their own."""
        x = self.nodes[call.x].meta["val"]
        if str(x.shape[0]) != str(self.index.meta["val"].shape[0]):
            what = "this layer reads the tokens of all rows as one: it cannot tell whose they are"
            raise PeftfxError(what, site.path, "leave it out of the adapters")
        parts = {what: self.row(site.path, what, x.ndim) for what in (INNER, OUTER, A, B, OWN)}
        acting = Acting(parts[INNER], parts[OUTER], parts[A], parts[B], parts[OWN])
        update_call(self.nodes, call, acting)

    def row(self, path: str, what: str, ndim: int) -> fx.Node | None:
        """The entry of each row, with axes to broadcast along a layer's of so many."""
        if (path, what) not in self.stacks:
            return None
        name = f"{path}.{what}.{ndim}"
        if (path, name) not in self.taken:
            after = self.index.next
            table = self._table(f"{path}.{what}", self.stacks[path, what])
            taken = add_node(after, self.index, aten.index_select.default, table, 0, self.index)
            for _ in range(ndim - taken.meta["val"].ndim):
                taken = add_node(after, self.index, aten.unsqueeze.default, taken, 1)
            self.taken[path, name] = taken
        return self.taken[path, name]

    def _table(self, name: str, value: Tensor) -> fx.Node:
        self.graph.derived[name] = Given(value)
        fake = fake_like(self.index.meta["val"], value)
        return attribute(self.graph.module.graph, f"{DERIVED}.{name}", fake, self.attributes)

    def fill(self) -> None:
        """Put the prefixes into their hole."""
        hole = self.attributes.get(f"{CONSTANTS}.{PREFIXES}")
        if hole is not None:
            hole.replace_all_uses_with(self._table(f"sequence.{PREFIX}", self.stacks["", PREFIX]))
            self.graph.module.graph.erase_node(hole)
