"""Sweep: drop what computes a value that nobody uses, as the base's own output where an adapter computes it anew."""

from __future__ import annotations

from dataclasses import dataclass

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Sweep(Pass):
    """Drop nodes without users. What changes a tensor in place or draws random numbers stays: it is seen elsewhere.

    `Remove` needs what an insertion has replaced: this is for a graph that is only run.
    """

    preserves = True

    def __call__(self, graph: Graph) -> PassResult:
        result = graph.clone()
        rewriter = Rewriter(result.module.graph)
        dropped = sweep(rewriter)
        rewriter.close(result)
        return PassResult(result, dropped) if dropped else PassResult(graph, 0)


def sweep(rewriter: Rewriter) -> int:
    """Erase nodes without users, in place; returns how many. fx's own pass wants derived weights to exist by now."""
    dropped = 0
    for node in reversed(list(rewriter.graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            rewriter.erase(node)
            dropped += 1
    return dropped
