"""Evaluate: compute derived weights now, in memory; the export evaluates them one by one, as it writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftfx.graph import DERIVED, Graph, link
from peftfx.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Evaluate(Pass):
    """Give every derived weight a value; the graph can then run in torch."""

    preserves = True

    def __call__(self, graph: Graph) -> PassResult:
        if not graph.derived or DERIVED in graph.module._modules:
            return PassResult(graph, 0)
        new = graph.clone()
        root = nn.Module()
        for name in graph.derived:
            path, _, leaf = name.rpartition(".")
            holder = root
            for part in path.split("."):
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_buffer(leaf, graph.get(f"{DERIVED}.{name}"))
        new.module = link(new.module.graph, {**dict(new.module.named_children()), DERIVED: root})
        return PassResult(new, len(new.derived))
