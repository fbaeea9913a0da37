"""Attentions: softmax(query key^T) value, as one op or written out, found by the flow of scores and probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from peftfx.analysis.dataflow import FUSED_ATTENTION, MATMULS, Flow, op_name, operands
from peftfx.graph.graph import Graph


@dataclass(frozen=True)
class Attention:
    """softmax(query key^T) value, fused or written out; `op` is the last of its nodes.

    Attributes:
        op: whose value leaves the attention.
        query, key, value: the operands; a key that is written out is turned.
        product: the product of query and key; `op` itself where all is one op.
        logits: what the softmax is taken of.
    """

    op: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    product: fx.Node
    logits: fx.Node | None = None

    def inputs(self) -> Iterator[tuple[str, fx.Node]]:
        return iter((("query", self.query), ("key", self.key), ("value", self.value)))


def find_attentions(graph: Graph, flows: Mapping[fx.Node, Flow]) -> Iterator[Attention]:
    """The attentions of a graph, in order. A softmax of anything but a product of two values is none (routers are)."""
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
        elif name in MATMULS and (found := operands(node)) and (softmax := flows[found[0]].softmax):
            logits = softmax.args[0]
            assert isinstance(logits, fx.Node)
            product = min(flows[logits].products, default=None)
            if product is not None and (scores := operands(product)):
                yield Attention(node, *scores, found[1], product, logits)
