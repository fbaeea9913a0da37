"""Compute derived weights now, in memory. An export instead computes them one by one when it writes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftfx.graph.graph import DERIVED, Graph
from peftfx.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Evaluate(Pass):
    """Give every derived weight a value, so that the graph can run in torch."""

    preserves = True
    ensures = ("evaluated",)

    def __call__(self, graph: Graph) -> PassResult:
        if graph.evaluated >= graph.derived.keys():
            return PassResult(graph, 0)
        new = graph.clone()
        evaluate(new)
        return PassResult(new, len(new.derived))


def evaluate(graph: Graph) -> None:
    """Compute the derived weights of a graph from the current tensors, in place."""
    root = nn.Module()
    for name, recipe in graph.derived.items():
        path, _, leaf = name.rpartition(".")
        holder = root
        for part in path.split("."):
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.register_buffer(leaf, recipe.evaluate(graph.get))
    graph.module.add_module(DERIVED, root)
