"""Output heads and expert routers, found by walking back from outputs and from the ends of experts' rows.

A head's value is an output of the graph, unchanged. A router selects the expert of each row of values. If rows are
sorted by their experts, one grouped product multiplies them, and the ends of each expert's rows are computed from the
indices that the router's scores give. If every expert reads every value, a router is a layer whose largest output
features are picked, for each value by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import fx

from peftfx.analysis.dataflow import ACTIVATIONS, ELEMENTWISE, MOVEMENT, PRODUCTS, SOFTMAX, Flow, op_name
from peftfx.analysis.facts import Analysis, WeightFacts
from peftfx.graph.graph import Graph
from peftfx.sites.site import EXPERTS


def reaches_output(graph: Graph, flows: Mapping[fx.Node, Flow], kept: Collection[str] = ()) -> set[fx.Node]:
    """Return the nodes whose values reach an output only moved, scaled, shifted or masked by constants.

    Args:
        graph: a base graph.
        flows: the dataflow of its nodes.
        kept: the names of outputs that do not count.
    """
    reached: set[fx.Node] = set()
    for node in reversed(list(graph.nodes())):
        if node.op == "output":
            named = zip(graph.outputs, node.args[0], strict=True)  # type: ignore[arg-type]
            results = (n for name, n in named if isinstance(n, fx.Node) and name not in kept)
            reached.update(n for n in results if flows[n].origins)
        elif node in reached and _keeps(node, flows):
            reached.update(_data(node, flows))
    return reached


def _keeps(node: fx.Node, flows: Mapping[fx.Node, Flow]) -> bool:
    name = op_name(node)
    if name in ACTIVATIONS:
        return name == "tanh" and _is_soft_cap(node)
    return name in MOVEMENT or (name in ELEMENTWISE and len(_data(node, flows)) == 1) or name.startswith("upsample")


def _is_soft_cap(tanh: fx.Node) -> bool:
    """Return whether a tanh is part of `c * tanh(x / c)`, which bounds logits. Another tanh is an activation."""
    after = list(tanh.users)
    return len(after) == 1 and _scales(tanh.args[0]) and _scales(after[0])


def _scales(node: object) -> bool:
    return isinstance(node, fx.Node) and op_name(node) in PRODUCTS and len(node.all_input_nodes) == 1


def _data(node: fx.Node, flows: Mapping[fx.Node, Flow]) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if flows[n].origins]


def find_routers(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield the linear layers whose output selects the expert of a value. A layer may come several times."""
    yield from _choosing(analysis)
    yield from _sorting(analysis)


def find_output_gates(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield the linear layers of one feature whose activated output multiplies an MLP's whole output."""
    for weight in analysis.weights.values():
        first = weight.occurrences[0]
        if first.kind == "linear" and not weight.role and 1 in first.shape and _scales_an_mlp(analysis, first.op):
            yield weight


def _scales_an_mlp(analysis: Analysis, node: fx.Node) -> bool:
    while len(node.users) == 1:
        (user,) = node.users
        others = [n for n in _data(user, analysis.flows) if n is not node]
        if not others and (op_name(user) in ELEMENTWISE or op_name(user) in ACTIVATIONS):
            node = user
            continue
        origins = [o for n in others for o in analysis.flows[n].origins]
        roles = {analysis.owner[o].role if o in analysis.owner else "" for o in origins}
        return op_name(user) in PRODUCTS and roles == {"mlp.down"}
    return False


def _choosing(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield linear layers whose output reaches a `topk` over features through scales, shifts and softmax only."""
    for node in analysis.graph.nodes():
        if op_name(node) != "topk" or not isinstance(node.args[0], fx.Node):
            continue
        scores, axis = node.args[0], node.args[2] if len(node.args) > 2 else -1
        if axis not in (-1, scores.meta["val"].ndim - 1):
            continue
        while scores not in analysis.owner and (op_name(scores) in SOFTMAX or op_name(scores) in ELEMENTWISE):
            data = _data(scores, analysis.flows)
            if len(data) != 1:
                break
            (scores,) = data
        weight = analysis.owner.get(scores)
        if weight is not None and weight.occurrences[0].kind == "linear":
            yield weight


def _sorting(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield the linear layers that the ends of a grouped product's groups are computed from."""
    ends = [found.op.args[2] for found in analysis.occurrences() if found.kind == EXPERTS]
    todo = [node for node in ends if isinstance(node, fx.Node)]
    seen = set(todo)
    while todo:
        node = todo.pop()
        weight = analysis.owner.get(node)
        if weight is not None:
            yield weight
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        todo += new
        seen.update(new)
