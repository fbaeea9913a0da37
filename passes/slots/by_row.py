"""ByRow: let each row of a batch have an adapter of its own, by a number that it comes with; -1 is none.

What adapters do at a layer is stacked, an entry for each of them behind one that changes nothing, and each row takes
its own. So do norms' tensors, and keys and values beside attentions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from peftfx.errors import PeftfxError
from peftfx.graph.contexts import isolated
from peftfx.graph.graph import BASE, CONSTANTS, DERIVED, Graph, TensorSpec
from peftfx.graph.recipe import Get
from peftfx.graph.rewriter import Rewriter
from peftfx.graph.slots import INNER, KEYS, OUTER, OWN, PREFIX, PROMPT, VALUES, A, B
from peftfx.passes.base import Pass, PassResult, attributes_of, fake_like
from peftfx.passes.slots.attention import join_beside
from peftfx.passes.slots.norms import replace_by_row
from peftfx.passes.slots.tokens_by_row import read_apart
from peftfx.passes.slots.weight import (
    Acting,
    add_node,
    along_channels,
    conv_low,
    has_one_dtype,
    product,
    times,
    update_call,
)
from peftfx.sites.site import Call, Site
from peftfx.views.row_adapters import IDS, NOWHERE, PREFIXES, PROMPTS

aten = torch.ops.aten
BIAS, SHOWN = "bias", "beside.shown"  #: of a stack: at a layer; beside an attention, [rows, tokens], which there are
_AT_LAYERS = (INNER, OUTER, A, B, BIAS)


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
        stacks: by a site's path and what is there: [adapters + 1, ...]; a norm's tensor is `OWN`, by its name. Those of
            `PREFIX` and `PROMPT` fill the hole of a view that was captured with soft prompts by row.
        beside: attentions, with the heads that the forward shows.
    """

    stacks: Mapping[tuple[str, str], Tensor]
    beside: tuple[Site, ...] = ()

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        with isolated(graph.base):
            rows = _Rows(new, self.stacks)
            here = {site.path: site for site in new.sites if not site.weight}
            for site in self.beside:  # first: what leaves them is found by what reads their last layer
                if (site.path, KEYS) in self.stacks and site.path in here:
                    rows.stand_beside(dataclasses.replace(site, calls=here[site.path].calls))
            for path in dict.fromkeys(path for path, what in self.stacks if what in _AT_LAYERS):
                for site in (site for site in new.sites if site.weight and site.path == path):
                    for call in site.calls:
                        rows.update(site, call)
            for name in (name for name, what in self.stacks if what == OWN):
                rows.norm(name)
            rows.fill()
        new.module.recompile()
        return PassResult(new, len(self.stacks))


class _Rows:
    """A graph in which rows get entries of their own."""

    def __init__(self, graph: Graph, stacks: Mapping[tuple[str, str], Tensor]) -> None:
        self.graph, self.stacks = graph, stacks
        self.nodes, self.attributes = {n.name: n for n in graph.nodes()}, attributes_of(graph)
        self.index = self._index()
        self.taken: dict[tuple[str, int], fx.Node] = {}

    def _index(self) -> fx.Node:
        """Which entry each row takes; see `peftfx.views.row_adapters.entries`."""
        inputs = [n for n in self.graph.nodes() if n.op == "placeholder"]
        known = next((i for i, spec in enumerate(self.graph.inputs) if spec.name == IDS), None)
        ids = self._input(inputs[-1]) if known is None else inputs[known]
        if not ids.users:  # where nothing has read it yet, nothing says that it is as long as the batch
            ids.meta = {"val": self._numbers(inputs[0].meta["val"])}
        first = next(n for n in self.graph.nodes() if n.op not in ("placeholder", "get_attr"))
        index = add_node(first, first, aten.add.Tensor, ids, 1)
        wrong = add_node(first, first, aten.lt.Scalar, index, 0)
        return add_node(first, first, aten.masked_fill.Scalar, index, wrong, NOWHERE)

    def _input(self, last: fx.Node) -> fx.Node:
        self.graph.inputs = (*self.graph.inputs, TensorSpec(IDS, torch.long, self.graph.inputs[0].shape[:1]))
        with self.graph.module.graph.inserting_after(last):
            return self.graph.module.graph.placeholder(IDS)

    def _numbers(self, like: Tensor) -> Tensor:
        """A fake number for each row of a batch."""
        mode = detect_fake_mode([like])
        assert mode is not None
        with mode:
            return torch.empty(like.shape[:1], dtype=torch.long, device=like.device)

    def update(self, site: Site, call: Call) -> None:
        """Let the rows of one call have their own."""
        if not has_one_dtype(site, self.nodes):
            hint = "merge an adapter that acts there, one export for each"
            raise PeftfxError("this layer computes in a dtype of its own: rows cannot choose there", site.path, hint)
        if site.kind == "linear" and call.y == call.op and not self.apart(self.nodes[call.x]):
            call = read_apart(self.nodes, call, self.index)
        op, y = self.nodes[call.op], self.nodes[call.y].meta["val"]
        self.check(self.nodes[call.x], site.path)
        given = [what for what in (INNER, OUTER, BIAS) if (site.path, what) in self.stacks]
        ndim = 2 if site.kind == "conv" else y.ndim
        parts = {what: along_channels(op, self.row(site.path, what, ndim), site) for what in given}
        low = self.low(site, call) if (site.path, A) in self.stacks else None
        update_call(self.nodes, site, call, Acting(parts.get(INNER), parts.get(OUTER), low, parts.get(BIAS)))

    def apart(self, value: fx.Node) -> bool:
        """Whether a value's first axis is the batch's."""
        return str(value.meta["val"].shape[0]) == str(self.index.meta["val"].shape[0])

    def check(self, value: fx.Node, where: str) -> None:
        """Refuse a value whose first axis is not the batch's."""
        if not self.apart(value):
            what = "this layer reads the tokens of all rows as one: it cannot tell whose they are"
            raise PeftfxError(what, where, "leave it out of the adapters")

    def norm(self, name: str) -> None:
        """Let rows have their own in the place of a norm's tensor."""
        tensor = self.attributes.get(f"{BASE}.{name}")
        if tensor is None:  # this view does not run it
            return

        def row(value: fx.Node, axes: int) -> fx.Node:
            self.check(value, name)
            return self.row(name, OWN, axes)

        replace_by_row(tensor, row, name)

    def stand_beside(self, site: Site) -> None:
        """Let rows have keys and values of their own beside each call of an attention."""
        keys, values = (self.row(site.path, what, 4) for what in (KEYS, VALUES))
        shown = self.row(site.path, SHOWN, 2)
        for index in range(len(site.calls)):
            join_beside(self.graph, self.nodes, site, index, keys, values, shown)

    def low(self, site: Site, call: Call) -> fx.Node:
        """The low-rank sum of each row's own factors."""
        op, x = self.nodes[call.op], self.nodes[call.x]
        if site.kind == "conv":
            return self.conv_low(site, op, x)
        y_axes = self.nodes[call.y].meta["val"].ndim
        b = self.row(site.path, B, y_axes)
        if site.kind == "linear":
            return product(op, x, self.row(site.path, A, y_axes), b)
        table = self._table(f"{site.path}.{A}", self.stacks[site.path, A].flatten(0, 1))
        first = add_node(op, op, aten.mul.Tensor, self.index, site.shape[0])
        for _ in range(x.meta["val"].ndim - 1):
            first = add_node(op, op, aten.unsqueeze.default, first, -1)
        numbers = add_node(op, op, aten.add.Tensor, x, first)
        return times(op, add_node(op, op, aten.embedding.default, table, numbers), b)

    def conv_low(self, site: Site, op: fx.Node, x: fx.Node) -> fx.Node:
        """All adapters' factors are one conv, and each row takes what its own give: a conv has one weight for all."""
        a, b = self.stacks[site.path, A][1:].flatten(0, 1), self.stacks[site.path, B].flatten(2)
        own = (
            torch.block_diag(*b[1:].transpose(1, 2)).unflatten(1, b[1:].shape[:2]).transpose(0, 1)
        )  # [adapters, all, out]
        table = torch.cat([torch.zeros_like(own[:1]), own])
        low = conv_low(op, x, self._table(f"{site.path}.{A}", a))
        axes = list(range(low.meta["val"].ndim))
        last = add_node(op, op, aten.permute.default, low, [0, *axes[2:], 1])
        rows = self.entry(f"{site.path}.{B}", table, len(axes))
        added = add_node(op, op, aten.matmul.default, last, rows)
        return add_node(op, op, aten.permute.default, added, [0, axes[-1], *axes[1:-1]])

    def row(self, path: str, what: str, ndim: int) -> fx.Node:
        """The entry of each row, with axes to broadcast along a layer's of so many."""
        return self.entry(f"{path}.{what}", self.stacks[path, what], ndim)

    def entry(self, name: str, stack: Tensor, ndim: int) -> fx.Node:
        """The entry of each row in a stack."""
        if (name, ndim) not in self.taken:
            after = self.index.next
            taken = add_node(after, self.index, aten.index_select.default, self._table(name, stack), 0, self.index)
            for _ in range(ndim - taken.meta["val"].ndim):
                taken = add_node(after, self.index, aten.unsqueeze.default, taken, 1)
            self.taken[name, ndim] = taken
        return self.taken[name, ndim]

    def _table(self, name: str, value: Tensor) -> fx.Node:
        self.graph.derived[name] = Given(value)
        fake = fake_like(self.index.meta["val"], value)
        return Rewriter(self.graph.module.graph).attribute(f"{DERIVED}.{name}", fake)

    def fill(self) -> None:
        """Put the soft prompts into their hole."""
        for name, what in ((PREFIXES, PREFIX), (PROMPTS, PROMPT)):
            hole = self.attributes.get(f"{CONSTANTS}.{name}")
            if hole is not None:
                hole.replace_all_uses_with(self._table(f"sequence.{what}", self.stacks["", what]))
                self.graph.module.graph.erase_node(hole)
