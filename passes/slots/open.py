"""Give a graph slots: inputs for scales and low-rank sums at layers, and for keys and values at attentions.

An empty slot changes nothing, so the base's graph is a special case of the new graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from peftfx.graph.contexts import isolated
from peftfx.graph.graph import Graph, TensorSpec
from peftfx.graph.rewriter import Rewriter
from peftfx.graph.slots import INNER, KEYS, OUTER, SLOT_A, SLOT_B, SLOT_TOKENS, VALUES, Slot, shapes
from peftfx.passes.base import Pass, PassResult
from peftfx.passes.optimization.dead_code import sweep
from peftfx.passes.slots.attention import join_beside
from peftfx.passes.slots.layer import Effect, Layers, acted, low_rank, operation
from peftfx.sites.site import HeadedSite, Site

HINT = 3  #: the size of a free axis in the graph's example


@dataclass(frozen=True)
class Open(Pass):
    """Open slots at sites, which are given by their paths.

    Attributes:
        updated: the sites with a weight that get slots for a low-rank sum and a scale of their output. A site that
            casts gets no slots.
        scaled: the updated sites that also get a slot for a scale of their input.
        beside: the attentions that get slots for keys and values beside the text's, with their heads as found in the
            forward view.
    """

    requires = ("inference", "bare")

    updated: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    beside: tuple[HeadedSite, ...] = ()

    def __call__(self, graph: Graph) -> PassResult:
        opening = _Opening(graph.clone())
        layers = Layers(opening.rewriter)
        with isolated(graph.base):
            here = {site.path: site for site in graph.sites.attentions}
            for site in self.beside:  # attentions first: their outputs are found by the readers of their last layer
                if site.path in here:
                    opening.stand_beside(layers, dataclasses.replace(site, calls=here[site.path].calls))
            for layer in graph.sites.weights:
                if layer.path in self.updated and layers.has_one_dtype(layer):
                    opening.update(layers, layer, scaled=layer.path in self.scaled)
        sweep(opening.rewriter)
        opening.rewriter.close(opening.graph)
        return PassResult(opening.graph, len(opening.slots))


def slots_of(graph: Graph, beside: Iterable[HeadedSite]) -> list[Slot]:
    """Return the slots that `Open` added to a graph's inputs."""
    convs = {site.path for site in graph.sites if site.kind == "conv"}
    behind = {site.path: site.heads.packed for site in beside}
    found = []
    for spec in graph.inputs:
        what = next((w for w in (SLOT_A, SLOT_B, INNER, OUTER, KEYS, VALUES) if spec.name.endswith(f".{w}")), None)
        if what is not None:
            at = spec.name.removesuffix(f".{what}")
            kind = str(spec.dtype).removeprefix("torch.")
            joins = what in (KEYS, VALUES) and behind[at]
            least = 1 if what in (SLOT_A, SLOT_B) and at in convs else 0
            found.append(Slot(spec.name, what, at, spec.shape, kind, least=least, behind=joins))
    return found


def slotted(site: Site, node: fx.Node) -> Callable[..., Tensor]:
    """Return a layer with slots as a function of its input, weight and bias, and the slots' tensors."""
    op = operation(node, site)

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, outer: Tensor, *inner: Tensor
    ) -> Tensor:
        low = low_rank(site, op, node, x, a, b)
        return acted(site, op, x, weight, bias, Effect(inner[0] if inner else None, outer, low))

    return forward


class _Opening:
    """A graph in which slots are being opened."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.rewriter = graph, Rewriter(graph.module.graph)
        self.last = [n for n in graph.nodes() if n.op == "placeholder"][-1]
        mode = detect_fake_mode([self.last.meta["val"]])
        assert mode is not None
        self.mode = mode
        self.slots: list[TensorSpec] = []
        self.free: dict[str, torch.SymInt] = {}

    def update(self, layers: Layers, site: Site, *, scaled: bool) -> None:
        """Open slots for a low-rank sum and scales at each call of a site."""
        like = layers.nodes[site.calls[0].op].meta["val"]
        words = (SLOT_A, SLOT_B, OUTER, INNER) if scaled else (SLOT_A, SLOT_B, OUTER)
        made = [self.slot(f"{site.path}.{what}", shapes(site)[what], like) for what in words]
        for call in site.calls:
            layers.act(site, call, ("slots", scaled), slotted(site, layers.nodes[call.op]), *made)

    def stand_beside(self, layers: Layers, site: HeadedSite) -> None:
        """Open slots for keys and values beside each call of an attention."""
        heads = site.heads
        like = layers.nodes[site.calls[0].y].meta["val"]
        widths = [sum(end - start for start, end in rows) // heads.kept for rows in (heads.key_rows, heads.value_rows)]
        keys, values = (
            self.slot(f"{site.path}.{what}", (heads.kept, SLOT_TOKENS, width), like)
            for what, width in zip((KEYS, VALUES), widths, strict=True)
        )
        for index in range(len(site.calls)):
            join_beside(self.graph, layers, site, index, keys, values)

    def slot(self, name: str, shape: tuple[int | str, ...], like: Tensor) -> fx.Node:
        """Add an input, with the dtype of `like`."""
        sizes = [self.size(s) if isinstance(s, str) else s for s in shape]
        with self.mode:
            value = torch.empty(sizes, dtype=like.dtype, device=like.device)
        self.last = self.rewriter.placeholder(name.replace(".", "_"), value, self.last)
        spec = TensorSpec(name, like.dtype, shape)
        self.slots.append(spec)
        self.graph.inputs = (*self.graph.inputs, spec)
        self.graph.sizes = {**self.graph.sizes, **{s: HINT for s in shape if isinstance(s, str)}}
        return self.last

    def size(self, axis: str) -> torch.SymInt:
        """Return the symbol of a free axis."""
        if axis not in self.free:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            size: Any = self.mode.from_tensor(torch.empty(HINT), symbolic_context=context).shape[0]
            self.free[axis] = size
        return self.free[axis]
