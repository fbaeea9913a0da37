"""Gradient checkpointing for graphs: a graph is cut where layers end, and the backward computes each piece again.

A cut is a position in the order in which the nodes run, so every cut is correct. At the end of a layer, few values pass
from one side to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from peftfx.graph.graph import Graph
from peftfx.graph.linking import link
from peftfx.graph.rewriter import program_of
from peftfx.sites.dataflow import keys_of


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes of a graph, as a module of their own.

    Attributes:
        run: computes the values of `outputs` from those of `inputs`.
        inputs, outputs: the names of nodes of the graph.
        dropped: the names of nodes that no later piece reads.
        layer: whether the backward computes the piece again. The nodes after the last layer, and pieces with nodes that
            may run only once, are not computed again.
    """

    run: Callable[..., tuple[Any, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dropped: frozenset[str]
    layer: bool


class Pieces:
    """A graph that runs piece by piece; the pieces that are layers are checkpointed.

    Args:
        graph: the graph to run.
        every: the interval of checkpointed layers: 1 for every layer, 2 for every second layer.
        options: options of `torch.utils.checkpoint.checkpoint`.
    """

    def __init__(self, graph: Graph, every: int, options: Mapping[str, Any]) -> None:
        self.graph, self.options = graph, {"use_reentrant": False, **options}
        nodes = [node for node in graph.nodes() if node.op == "call_function"]
        (output,) = (node for node in graph.nodes() if node.op == "output")
        self.results: Any = fx.node.map_arg(output.args[0], _Name)  # type: ignore[arg-type]
        parts = _cut(nodes, _ends(graph))
        self.pieces = tuple(_pieces(graph, parts, output, every))

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """Run the graph, as `Graph.run` does."""
        self.graph.refuse_unlike(tensors)
        values: dict[str, Any] = dict(zip((n.name for n in self.graph.nodes() if n.op == "placeholder"), tensors))
        for piece in self.pieces:
            given = [values[name] for name in piece.inputs]
            for name in piece.dropped:
                values.pop(name, None)
            values.update(zip(piece.outputs, self._run(piece, given), strict=True))
            del given
        return list(fx.node.map_aggregate(self.results, lambda x: values[x.name] if isinstance(x, _Name) else x))

    def _run(self, piece: Piece, given: Sequence[Any]) -> tuple[Any, ...]:
        if not piece.layer or not torch.is_grad_enabled():
            return piece.run(*given)
        starts = not any(isinstance(value, Tensor) and value.requires_grad for value in given)
        if starts and self.options["use_reentrant"]:  # a reentrant checkpoint would lose the gradients inside
            return piece.run(*given)
        return checkpoint(piece.run, *given, **self.options)


def layers_end(graph: Graph) -> bool:
    """Return whether a graph has a place where a layer ends and the graph can be cut."""
    return bool(_ends(graph))


class _Name:
    """A node's name, which stands for the node in a graph's output structure."""

    def __init__(self, node: fx.Node) -> None:
        self.name = node.name


def _ends(graph: Graph) -> set[str]:
    """Return the names of the nodes where layers end."""
    sites = dict(zip(keys_of(graph.sites.items), graph.sites.items, strict=True))
    names = {node.name for node in graph.nodes()}
    ends = graph.sites.layer_ends().values()
    found = {sites[end].calls[-1].y if end in sites else end.partition(":")[2] for end in ends}
    return found & names


def _cut(nodes: Sequence[fx.Node], ends: set[str]) -> list[list[fx.Node]]:
    """Return the nodes in parts: each part up to the end of a layer, and the rest after the last layer."""
    apart: list[list[fx.Node]] = [[]]
    held = _held_together(nodes)
    for place, node in enumerate(nodes):
        apart[-1].append(node)
        if node.name in ends and not any(first <= place < last for first, last in held):
            apart.append([])
    return apart


def _held_together(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Return the ranges in which a graph is not cut: from a tensor's creation to the last write into it."""
    places = {node: place for place, node in enumerate(nodes)}
    return [(places.get(_root(written), 0), place) for place, n in enumerate(nodes) for written in _written(n)]


def _written(node: fx.Node) -> Iterator[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        for index, argument in enumerate(schema.arguments):
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if argument.is_write and isinstance(given, fx.Node):
                yield given


def _root(node: fx.Node) -> fx.Node:
    """Return the node whose output a node is a view of, or the node itself."""
    schema = getattr(node.target, "_schema", None)
    while node.op == "call_function" and schema is not None and any(a.alias_info for a in schema.arguments):
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            break
        node = first
        schema = getattr(node.target, "_schema", None)
    return node


def _pieces(graph: Graph, parts: Sequence[Sequence[fx.Node]], output: fx.Node, every: int) -> Iterator[Piece]:
    where = {node: number for number, part in enumerate(parts) for node in part}
    last = len(parts) - 1
    returned = set(output.all_input_nodes)
    holders = dict(graph.module.named_children())

    def last_reader(node: fx.Node) -> int:
        """Return the number of the last part that reads a node's value; of a value that is returned, one more."""
        return max((where.get(user, len(parts)) for user in node.users), default=-1)

    for number, part in enumerate(parts):
        own = set(part)
        read = dict.fromkeys(node for user in part for node in user.all_input_nodes if node not in own)
        attributes = [node for node in read if node.op == "get_attr"]
        inputs = [node for node in read if node.op != "get_attr"]
        if number == last:
            attributes += [node for node in returned if node.op == "get_attr" and node not in read]
        outputs = [node for node in part if last_reader(node) > number]
        outputs += [node for node in attributes if node in returned and number == last]
        module = link(program_of(inputs, [*attributes, *part], outputs), holders)
        again = number < last and number % every == 0 and not any(_runs_once(node, graph) for node in part)
        yield Piece(
            *(module.forward, tuple(n.name for n in inputs), tuple(n.name for n in outputs)),
            dropped=frozenset(n.name for n in inputs if last_reader(n) <= number),
            layer=again,
        )


def _runs_once(node: fx.Node, graph: Graph) -> bool:
    """Return whether a node writes into the model's tensors (a norm's running mean, say) or into an input."""
    if any(_root(written).op in ("placeholder", "get_attr") for written in _written(node)):
        return True
    name = str(getattr(node.target, "_opname", ""))
    return graph.training and name.endswith(("batch_norm", "instance_norm"))
