"""Attentions: softmax(query key^T) value, as one op or as several, found by the flow of scores and probabilities."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from peftfx.analysis.dataflow import FUSED_ATTENTION, MATMULS, Flow, op_name, operands
from peftfx.graph.graph import Graph

_RECURRENCE = "peftfx::recurrence"  #: its last argument says whether it is a delta rule, or a state space


@dataclass(frozen=True)
class Attention:
    """One softmax(query key^T) value, or alike, fused or of several nodes. `op` is the last node.

    Attributes:
        op: the node whose value leaves the attention.
        query, key, value: the operands. If there are several nodes, the key is transposed.
        product: the product of query and key; `op` itself if the attention is one op.
        logits: the input of the softmax; None if the attention is one op, or has no softmax.
        normalised: whether the weights of the values are a softmax. If not, they are another function of each score,
            or the attention is a delta rule, which has no scores.
    """

    op: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    product: fx.Node
    logits: fx.Node | None = None
    normalised: bool = True

    def inputs(self) -> Iterator[tuple[str, fx.Node]]:
        return iter((("query", self.query), ("key", self.key), ("value", self.value)))


def find_attentions(graph: Graph, flows: Mapping[fx.Node, Flow], layers: Collection[fx.Node]) -> Iterator[Attention]:
    """Yield the attentions of a graph, in order. A softmax of anything but a product of two values is none.

    A delta rule is one: each token reads by a query what keys and values have written. A state space is none. Instead
    of a softmax there may be another function of each score, if queries, keys and values are all computed: a
    feed-forward of two products with parameters is none. A parameter that is itself the query of values that no layer
    projects is none either: that is a learned mean of them, such as one of the outputs of the layers before.

    Args:
        graph: a base graph.
        flows: the flow of each of its nodes.
        layers: the operations of layers with weights, without embeddings.
    """
    for node in graph.nodes():
        if node.op != "call_function" or not flows[node].origins:
            continue
        name = op_name(node)
        if name == FUSED_ATTENTION:
            query, key, value = node.args[:3]
            assert isinstance(query, fx.Node)
            assert isinstance(key, fx.Node)
            assert isinstance(value, fx.Node)
            yield Attention(node, query, key, value, node)
        elif name == _RECURRENCE and node.args[6]:
            query, key, value = node.args[:3]
            yield Attention(node, query, key, value, node, normalised=False)  # type: ignore[arg-type]
        elif name in MATMULS and (found := operands(node)):
            yield from (a for a in _of_products(node, found, flows) if not _is_mean(a, flows, layers))


def _of_products(op: fx.Node, found: tuple[fx.Node, fx.Node], flows: Mapping[fx.Node, Flow]) -> Iterator[Attention]:
    weights, value = found
    softmax = flows[weights].softmax
    logits = weights if softmax is None else softmax.args[0]
    assert isinstance(logits, fx.Node)
    product = min(flows[logits].products, default=None)
    if product is None or not (scores := operands(product)):
        return
    if softmax is not None:
        yield Attention(op, *scores, value, product, logits)
    elif flows[weights].bent and all(flows[node].origins for node in (*scores, value)):
        yield Attention(op, *scores, value, product, normalised=False)


def _is_mean(found: Attention, flows: Mapping[fx.Node, Flow], layers: Collection[fx.Node]) -> bool:
    """Return whether a query comes from parameters alone, and the values from other things than layers and inputs."""
    learned = not flows[found.query].origins or not flows[found.key].origins
    return learned and any(o.op != "placeholder" and o not in layers for o in flows[found.value].origins)
