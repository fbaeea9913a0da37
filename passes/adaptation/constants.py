"""freeze: what depends on adapters and on no input becomes a recipe, computed once: a prompt encoder, a projection."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from peftfx.graph.graph import ADAPTERS, DERIVED, Graph, link
from peftfx.graph.recipe import Get
from peftfx.graph.rewriter import OVERRIDES, REGION, Rewriter, program_of

aten = torch.ops.aten
#: Operators that move or repeat values and compute none.
_MOVES = frozenset(
    {
        *(aten.expand.default, aten.repeat.default, aten.view.default, aten.reshape.default, aten.alias.default),
        *(aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.clone.default),
    }
)


@dataclass(frozen=True)
class Computed:
    """A recipe that runs a small program on the tensors that it reads.

    Attributes:
        program: from these tensors, in order, to the value.
        targets: their names in the graph.
    """

    program: fx.GraphModule = field(repr=False)
    targets: tuple[str, ...]

    @torch.no_grad()
    def evaluate(self, get: Get) -> Tensor:
        """Its value now, given how to read the graph's tensors."""
        value = self.program(*(get(target).detach() for target in self.targets))
        assert isinstance(value, Tensor)
        return value.contiguous()


def freeze(graph: Graph) -> int:
    """Turn each value that adapters decide, and no input does, into a recipe, in place; returns how many there were.

    Only the last values of such a computation become recipes: those that something reads which an input reaches. What
    repeats a value stays in the graph, for a repeated value is larger; so does what is random.
    """
    free = _input_free(graph)
    edges = [n for n in free if any(user not in free for user in n.users)]
    rewriter = Rewriter(graph.module.graph)
    cuts = dict.fromkeys(_before_repetition(node) for node in edges)
    for node in cuts:
        ancestors = list(_ancestors(node))
        name = _name(node, ancestors, graph.derived)
        graph.derived[name] = _recipe(node, ancestors)
        rewriter.replace(node, rewriter.attribute(f"{DERIVED}.{name}", node.meta["val"]))
    for node in reversed(list(graph.nodes())):
        if not node.users and (node in free or node.op == "get_attr"):
            rewriter.erase(node)
    rewriter.close(graph)
    return len(cuts)


def _input_free(graph: Graph) -> dict[fx.Node, None]:
    """An adapter's tensors, and what its own code computes from them and the base's, but from no input; in order.

    Not what the model's code makes of it: that may be a thousand pieces of one table.
    """
    constant: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    for node in graph.nodes():
        if node.op == "get_attr" or _is_constant(node, constant):
            constant.add(node)
            own = str(node.target).startswith(f"{ADAPTERS}.") and OVERRIDES not in node.meta
            added = REGION in node.meta or OVERRIDES in node.meta
            if (node.op == "get_attr" and own) or (added and any(n in found for n in node.all_input_nodes)):
                found[node] = None
    return found


def _is_constant(node: fx.Node, constant: Container[fx.Node]) -> bool:
    if node.op != "call_function" or not node.all_input_nodes or not isinstance(node.meta.get("val"), Tensor):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or node.is_impure()
    return not random and all(n in constant for n in node.all_input_nodes)


def _before_repetition(node: fx.Node) -> fx.Node:
    """The smallest value on the chain of moves that ends here."""
    smallest = node
    while node.target in _MOVES:
        node = node.all_input_nodes[0]
        if node.meta["val"].numel() < smallest.meta["val"].numel():
            smallest = node
    return smallest


def _name(node: fx.Node, ancestors: list[fx.Node], taken: Container[str]) -> str:
    """The name of a tensor that the adapter has, else one after the place of the adapter."""
    if node.op == "get_attr":
        return str(node.target).split(".", 2)[2]  # adapters.<adapter>.<name>
    if OVERRIDES in node.meta:  # the base's tensor with rows of the adapter's
        module = str(ancestors[-2].target).split(".", 3)[3].rpartition(".")[0]  # adapters.<adapter>.saved.<module>.rows
        return f"{module}.{str(node.meta[OVERRIDES]).rpartition('.')[2]}"
    stem = next(n.meta[REGION].placement.key for n in reversed(ancestors) if REGION in n.meta)
    names = (f"{stem}.folded{count or ''}" for count in itertools.count())
    return next(name for name in names if name not in taken)


def _recipe(node: fx.Node, order: list[fx.Node]) -> Computed:
    weights = [n for n in order if n.op == "get_attr"]
    return Computed(link(program_of(weights, order, [node], single=True), {}), tuple(str(n.target) for n in weights))


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """A value and all that it is computed from, in order."""
    found, todo = {node}, [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n not in found:
                found.add(n)
                todo.append(n)
    return (n for n in node.graph.nodes if n in found)
