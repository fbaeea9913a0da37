"""Turn values that depend on adapters but on no input, such as a prompt encoder's, into recipes computed once."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from peftfx.analysis.dataflow import ancestors
from peftfx.graph.graph import ADAPTERS, DERIVED, Graph
from peftfx.graph.linking import link
from peftfx.graph.recipe import Get
from peftfx.graph.rewriter import OVERRIDES, REGION, Rewriter, program_of

aten = torch.ops.aten
#: Operators that only move or repeat values.
_MOVES = frozenset(
    {
        *(aten.expand.default, aten.repeat.default, aten.view.default, aten.reshape.default, aten.alias.default),
        *(aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.clone.default),
    }
)
#: Operators that solve equations.
_SOLVES = frozenset({aten.linalg_solve.default, aten.linalg_inv.default, aten.inverse.default})


@dataclass(frozen=True)
class Computed:
    """A recipe that runs a small program on the tensors that it reads.

    Attributes:
        program: computes the value from the tensors of `targets`, in order.
        targets: the names of the tensors in the graph.
    """

    program: fx.GraphModule = field(repr=False)
    targets: tuple[str, ...]

    @torch.no_grad()
    def evaluate(self, get: Get) -> Tensor:
        """Compute the value, given a function that reads the graph's tensors."""
        value = self.program(*(get(target).detach() for target in self.targets))
        assert isinstance(value, Tensor)
        return value.contiguous()


def freeze(graph: Graph) -> int:
    """Turn values that depend on adapters but on no input into recipes, in place. Return the number of recipes.

    Only the last values of such a computation become recipes, that is, values read by nodes that depend on an input.
    Operators that repeat a value stay in the graph, because a repeated value is larger. Random operators stay, too.
    """
    free = _input_free(graph)
    edges = [n for n in free if any(user not in free for user in n.users)]
    cuts = dict.fromkeys(_before_repetition(node) for node in edges)
    _cut(graph, cuts, free)
    return len(cuts)


def freeze_solutions(graph: Graph) -> Graph:
    """Return a copy where the solutions of equations between an adapter's tensors are recipes, computed once.

    ONNX has no operator that solves equations. The copy is the graph itself if it solves none.
    """
    if not any(node.target in _SOLVES for node in graph.nodes()):
        return graph
    result = graph.clone()
    free = _input_free(result, made=True)
    _cut(result, [node for node in free if node.target in _SOLVES], free)
    return result


def _cut(graph: Graph, cuts: Collection[fx.Node], free: Container[fx.Node]) -> None:
    """Turn these nodes into recipes, and erase the `free` nodes that nothing reads any more."""
    rewriter = Rewriter(graph.module.graph)
    for node in cuts:
        found = set(ancestors(node))
        order = [n for n in graph.nodes() if n in found]
        name = _name(node, order, graph.derived)
        graph.derived[name] = _recipe(node, order)
        rewriter.replace(node, rewriter.attribute(f"{DERIVED}.{name}", node.meta["val"]))
    for node in reversed(list(graph.nodes())):
        if not node.users and (node in free or node.op == "get_attr"):
            rewriter.erase(node)
    rewriter.close(graph)


def _input_free(graph: Graph, *, made: bool = False) -> dict[fx.Node, None]:
    """Return the nodes of an adapter's tensors, and of what its own code computes from no input; in order.

    Nodes of the model's code are left out: they may cut a table into a thousand pieces. With `made`, tensors that the
    adapter's code makes, such as `torch.eye`, are constants too.
    """
    constant: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    for node in graph.nodes():
        if node.op == "get_attr" or _is_constant(node, constant, made and REGION in node.meta):
            constant.add(node)
            own = str(node.target).startswith(f"{ADAPTERS}.") and OVERRIDES not in node.meta
            added = REGION in node.meta or OVERRIDES in node.meta
            if (node.op == "get_attr" and own) or (added and any(n in found for n in node.all_input_nodes)):
                found[node] = None
    return found


def _is_constant(node: fx.Node, constant: Container[fx.Node], made: bool) -> bool:
    if node.op != "call_function" or not (node.all_input_nodes or made):
        return False
    if not isinstance(node.meta.get("val"), (Tensor, list, tuple) if made else Tensor):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or node.is_impure()
    return not random and all(n in constant for n in node.all_input_nodes)


def _before_repetition(node: fx.Node) -> fx.Node:
    """Return the node with the smallest value on the chain of moves that ends here."""
    smallest = node
    while node.target in _MOVES:
        node = node.all_input_nodes[0]
        if node.meta["val"].numel() < smallest.meta["val"].numel():
            smallest = node
    return smallest


def _name(node: fx.Node, ancestors: list[fx.Node], taken: Container[str]) -> str:
    """Return the name of the adapter's tensor, or a new name after the place where the adapter acts."""
    if node.op == "get_attr":
        return str(node.target).split(".", 2)[2]  # adapters.<adapter>.<name>
    if OVERRIDES in node.meta:  # the base's tensor with some rows of the adapter
        rows = next(n for n in reversed(ancestors) if str(n.target).startswith(f"{ADAPTERS}."))
        module = str(rows.target).split(".", 3)[3].rpartition(".")[0]  # adapters.<adapter>.saved.<module>.rows
        return f"{module}.{str(node.meta[OVERRIDES]).rpartition('.')[2]}"
    stem = next(n.meta[REGION].placement.key for n in reversed(ancestors) if REGION in n.meta)
    names = (f"{stem}.folded{count or ''}" for count in itertools.count())
    return next(name for name in names if name not in taken)


def _recipe(node: fx.Node, order: list[fx.Node]) -> Computed:
    weights = [n for n in order if n.op == "get_attr"]
    return Computed(link(program_of(weights, order, [node], single=True), {}), tuple(str(n.target) for n in weights))
