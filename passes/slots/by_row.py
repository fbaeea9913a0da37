"""Let each row of a batch choose an adapter of its own, by a number in an input; -1 chooses none.

The adapters' tensors at a layer are stacked: first an entry that changes nothing, then an entry for each adapter. Each
row takes its own entry. The same is done for norms' tensors, and for keys and values beside attentions.
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
from peftfx.graph.slots import INNER, KEYS, OUTER, PREFIX, SLOT_A, SLOT_B, SLOT_OWN, SLOT_PROMPT, VALUES
from peftfx.passes.adaptation.sequence import first_operation
from peftfx.passes.base import Pass, PassResult, attributes_of, fake_like
from peftfx.passes.optimization.dead_code import sweep
from peftfx.passes.slots.attention import join_beside
from peftfx.passes.slots.layer import Layers
from peftfx.passes.slots.layer_by_row import BIAS_STACK, by_rows, each_token, lists_rows
from peftfx.passes.slots.norms import replace_by_row
from peftfx.sites.site import Call, HeadedSite, Site
from peftfx.views.row_adapters import IDS, PREFIXES, PROMPTS, entries

aten = torch.ops.aten
SHOWN = "beside.shown"  #: the kind of a stack beside an attention that says which tokens each row has: [rows, tokens]
PROMPTS_AT = "sequence"  #: where derived tensors of soft prompts are
_AT_LAYERS = (INNER, OUTER, SLOT_A, SLOT_B, BIAS_STACK)


@dataclass(frozen=True)
class Given:
    """A recipe that is just a tensor, rounded to a dtype."""

    value: Tensor = field(repr=False)
    dtype: torch.dtype

    def evaluate(self, get: Get) -> Tensor:
        """Return the tensor."""
        return self.value.to(self.dtype)


@dataclass(frozen=True, eq=False)
class ByRow(Pass):
    """Let each row of a batch choose its entry in stacks of adapters' tensors.

    Attributes:
        stacks: tensors [adapters + 1, ...], by a site's path and the kind of slot. A norm's tensor has the kind
            `SLOT_OWN`, and the tensor's name as its path. The stacks of `PREFIX` and `SLOT_PROMPT` fill the hole of a
            view captured with soft prompts by row.
        beside: the attentions, with their heads as found in the forward view.
        dtypes: the dtypes in which the graph has the stacks; by default their own.
        whole: whether a call is of one row, as that of an image's encoder: `adapter_ids` is [1].
    """

    requires = ("inference", "bare")

    stacks: Mapping[tuple[str, str], Tensor]
    beside: tuple[HeadedSite, ...] = ()
    dtypes: Mapping[tuple[str, str], torch.dtype] = field(default_factory=dict)
    whole: bool = False

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        with isolated(graph.base):
            rows = _Rows(new, self.stacks, self.dtypes, whole=self.whole)
            here = {site.path: site for site in new.sites.attentions}
            for site in self.beside:  # attentions first: their outputs are found by the readers of their last layer
                if (site.path, KEYS) in self.stacks and site.path in here:
                    rows.stand_beside(dataclasses.replace(site, calls=here[site.path].calls))
            for path in dict.fromkeys(path for path, what in self.stacks if what in _AT_LAYERS):
                for layer in (site for site in new.sites.weights if site.path == path):
                    for call in layer.calls:
                        rows.update(layer, call)
            for name in (name for name, what in self.stacks if what == SLOT_OWN):
                rows.norm(name)
            rows.fill()
        sweep(rows.rewriter)
        rows.rewriter.close(new)
        return PassResult(new, len(self.stacks))


class _Rows:
    """A graph that is being rewritten so that rows get entries of their own."""

    def __init__(
        self,
        graph: Graph,
        stacks: Mapping[tuple[str, str], Tensor],
        dtypes: Mapping[tuple[str, str], torch.dtype],
        *,
        whole: bool,
    ) -> None:
        self.graph, self.stacks, self.dtypes, self.whole = graph, stacks, dtypes, whole
        self.rewriter = Rewriter(graph.module.graph)
        self.attributes, self.index = attributes_of(graph), self._index()
        self.layers = Layers(self.rewriter)
        self.taken: dict[tuple[str, int], fx.Node] = {}

    def _index(self) -> fx.Node:
        """Return the number of the entry for each row; see `peftfx.views.row_adapters.entries`."""
        inputs = [n for n in self.graph.nodes() if n.op == "placeholder"]
        known = next((i for i, spec in enumerate(self.graph.inputs) if spec.name == IDS), None)
        along = next((i for i, spec in enumerate(self.graph.inputs) if spec.shape[:1] == ("batch",)), 0)
        numbers = self._numbers(inputs[along].meta["val"])
        if known is None:
            shape = (1,) if self.whole else self.graph.inputs[along].shape[:1]
            self.graph.inputs = (*self.graph.inputs, TensorSpec(IDS, torch.long, shape))
            ids = self.rewriter.placeholder(IDS, numbers, inputs[-1])
        else:
            ids = inputs[known]
        if not ids.users:  # unused so far, its length is not yet known to be the batch's
            self.rewriter.revalue(ids, numbers)
        return self.rewriter.before(first_operation(self.rewriter.graph)).trace(entries, ids, where=IDS)

    def _numbers(self, like: Tensor) -> Tensor:
        """Make a fake number for each row of a batch."""
        mode = detect_fake_mode([like])
        assert mode is not None
        with mode:
            return torch.empty(1 if self.whole else like.shape[:1], dtype=torch.long, device=like.device)

    def update(self, site: Site, call: Call) -> None:
        """Let the rows of one call of a layer have their own adapters."""
        if not self.layers.has_one_dtype(site):
            what = "this layer computes in another dtype than its weight's: rows cannot have their own adapters there"
            raise PeftfxError(what, site.path, "export each adapter that acts there by itself, merged")
        op, x = self.layers.nodes[call.op], self.layers.nodes[call.x]
        listed = site.kind == "linear" and call.y == call.op and self.listed(x)
        if not listed:
            self.check(x, site.path)
        axes = 3 if listed else self.layers.nodes[call.y].meta["val"].ndim
        given = {
            what: self.row(site.path, what, 2 if site.kind == "conv" else axes)
            for what in (INNER, OUTER, BIAS_STACK)
            if (site.path, what) in self.stacks
        }
        factors = [] if (site.path, SLOT_A) not in self.stacks else self.factors(site, axes)
        function = by_rows(site, op, tuple(given), bool(factors), listed)
        key = "rows", tuple(given), bool(factors), listed
        self.layers.act(site, call, key, function, self.index, *given.values(), *factors)

    def listed(self, value: fx.Node) -> bool:
        """Say whether a value has the tokens of all rows on its first axis; see `lists_rows`."""
        return not self.whole and lists_rows(value, self.index)

    def apart(self, value: fx.Node) -> bool:
        """Say whether a value's first axis is the batch."""
        return self.whole or str(value.meta["val"].shape[0]) == str(self.index.meta["val"].shape[0])

    def check(self, value: fx.Node, where: str) -> None:
        """Refuse a value whose first axis is not the batch."""
        if not self.apart(value):
            what = "this layer reads the tokens of all rows as one: it cannot tell whose they are"
            axis = str(value.meta["val"].shape[0])
            nodes = (node for node in self.graph.nodes() if node.op == "placeholder")
            for spec, node in zip(self.graph.inputs, nodes, strict=False):
                if spec.shape and spec.name != IDS and str(node.meta["val"].shape[0]) == axis:
                    what = f"the rows of this layer are those of {spec.shape[0]}, and adapters are chosen by batch"
            if isinstance(value.meta["val"].shape[0], int):
                what = "this layer computes the same for all rows: no row can have an adapter of its own there"
            raise PeftfxError(what, where, "leave it out of the adapters")

    def norm(self, name: str) -> None:
        """Let rows have tensors of their own in place of a norm's tensor."""
        tensor = self.attributes.get(f"{BASE}.{name}")
        if tensor is None:  # this view does not run the norm
            return

        def row(value: fx.Node, axes: int) -> fx.Node:
            if self.listed(value):
                own = self.row(name, SLOT_OWN, 2)
                return self.rewriter.after(value).trace(each_token, value, own, key="each token", where=name)
            self.check(value, name)
            return self.row(name, SLOT_OWN, axes)

        replace_by_row(self.rewriter, tensor, row, name)

    def stand_beside(self, site: HeadedSite) -> None:
        """Let rows have keys and values of their own beside each call of an attention."""
        keys, values = (self.row(site.path, what, 4) for what in (KEYS, VALUES))
        shown = self.row(site.path, SHOWN, 2)
        for index in range(len(site.calls)):
            join_beside(self.graph, self.layers, site, index, keys, values, shown)

    def factors(self, site: Site, axes: int) -> list[fx.Node]:
        """Return the factors for `by_rows`: each row's own, or tables of all adapters' factors to pick from."""
        a, b = self.stacks[site.path, SLOT_A], self.stacks[site.path, SLOT_B]
        if site.kind == "linear":
            return [self.row(site.path, what, axes) for what in (SLOT_A, SLOT_B)]
        if site.kind == "embedding":
            return [self._table(site.path, SLOT_A, a.flatten(0, 1)), self.row(site.path, SLOT_B, axes)]
        b = b.flatten(2)[1:]
        own = torch.block_diag(*b.transpose(1, 2)).unflatten(1, b.shape[:2]).transpose(0, 1)  # [adapters, all, out]
        rows = self.entry(site.path, SLOT_B, torch.cat([torch.zeros_like(own[:1]), own]), axes)
        return [self._table(site.path, SLOT_A, a[1:].flatten(0, 1)), rows]

    def row(self, path: str, what: str, ndim: int) -> fx.Node:
        """Return the entry of each row, with axes added so that it broadcasts to `ndim` axes."""
        return self.entry(path, what, self.stacks[path, what], ndim)

    def entry(self, path: str, what: str, stack: Tensor, ndim: int) -> fx.Node:
        """Return the entry of each row in a stack."""
        name = f"{path}.{what}"

        def entry(index: Tensor, table: Tensor) -> Tensor:
            taken = table.index_select(0, index)
            for _ in range(ndim - taken.ndim):
                taken = taken.unsqueeze(1)
            return taken

        if (name, ndim) not in self.taken:
            at, table = self.rewriter.after(self.index), self._table(path, what, stack)
            self.taken[name, ndim] = at.trace(entry, self.index, table, key=("entry", ndim), where=name)
        return self.taken[name, ndim]

    def _table(self, path: str, what: str, value: Tensor, dtype: torch.dtype | None = None) -> fx.Node:
        name = f"{path or PROMPTS_AT}.{what}"
        given = self.graph.derived[name] = Given(value, dtype or self.dtypes.get((path, what), value.dtype))
        return self.rewriter.attribute(
            f"{DERIVED}.{name}", fake_like(self.index.meta["val"], value.new_empty(value.shape, dtype=given.dtype))
        )

    def fill(self) -> None:
        """Put the stacks of soft prompts into their holes."""
        for name, what in ((PREFIXES, PREFIX), (PROMPTS, SLOT_PROMPT)):
            hole = self.attributes.get(f"{CONSTANTS}.{name}")
            if hole is not None:
                table = self._table("", what, self.stacks["", what], hole.meta["val"].dtype)
                self.rewriter.replace(hole, table)
                self.rewriter.erase(hole)


def with_exact_stacks(graph: Graph, prompts: Mapping[str, Tensor | None]) -> Graph:
    """Return the graph with its stacks as they are before they are rounded to its dtypes. It runs where all is wide.

    Args:
        graph: the graph.
        prompts: more exact stacks of soft prompts, by their kinds. What is None, or not in the graph, counts nothing.
    """
    given = {name: recipe.value for name, recipe in graph.derived.items() if isinstance(recipe, Given)}
    more = {f"{PROMPTS_AT}.{what}": value for what, value in prompts.items() if value is not None}
    given |= {name: value for name, value in more.items() if name in given}
    exact = {name: Given(value, value.dtype) for name, value in given.items()}
    return dataclasses.replace(graph.clone(), derived={**graph.derived, **exact})
