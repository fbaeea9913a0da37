"""Drop nodes whose value nobody uses, such as the base's own output if an adapter computes it anew."""

from __future__ import annotations

from dataclasses import dataclass

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Sweep(Pass):
    """Drop nodes without users. Nodes that change a tensor in place or draw random numbers stay.

    Use it only on a graph that is just run: `Remove` needs the nodes that an insertion has replaced.
    """

    preserves = True

    def __call__(self, graph: Graph) -> PassResult:
        result = graph.clone()
        rewriter = Rewriter(result.module.graph)
        dropped = sweep(rewriter)
        rewriter.close(result)
        return PassResult(result, dropped) if dropped else PassResult(graph, 0)


def sweep(rewriter: Rewriter, *, random: bool = False) -> int:
    """Erase nodes without users, in place, and return their number. fx's own pass needs evaluated derived weights.

    With `random`, those that draw random numbers too: the numbers that others draw are then not torch's.
    """
    dropped = 0
    for node in reversed(list(rewriter.graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure(impure_random=not random):
            rewriter.erase(node)
            dropped += 1
    return dropped
