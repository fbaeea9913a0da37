"""Find the nodes that read a weight (products and lookups of rows), and replace them by other nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

DOMAIN = "com.microsoft"  #: the domain of ONNX Runtime's operators that hold quantised weights


@dataclass(frozen=True)
class Reader:
    """A product with a weight: a node `x @ W`, or `x @ W.T + b`."""

    node: ir.Node
    transposed: bool  #: whether the weight is stored [out, in]

    @property
    def x(self) -> ir.Value:
        """The value that is multiplied by the weight."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    def replace(self, make: Callable[[ir.Value, ir.Value | None], Sequence[ir.Node]]) -> None:
        """Replace the product by nodes that `make` builds from `x` and the bias. The last node has the result."""
        _replace(self.node, make(self.x, self.node.inputs[2] if len(self.node.inputs) > 2 else None))


@dataclass(frozen=True)
class Lookup:
    """A node that looks up rows of a weight."""

    node: ir.Node

    def replace(self, make: Callable[[ir.Value], Sequence[ir.Node]]) -> None:
        """Replace the lookup by nodes that `make` builds from the rows' numbers. The last node has the rows."""
        numbers = self.node.inputs[1]
        assert numbers is not None
        _replace(self.node, make(numbers))


def _replace(node: ir.Node, made: Sequence[ir.Node]) -> None:
    graph = node.graph
    assert graph is not None
    for number, new in enumerate(made):
        new.name = node.name if new is made[-1] else f"{node.name}.{number}"
    old, result = node.outputs[0], made[-1].outputs[0]
    result.type, result.shape, result.name = old.type, old.shape, old.name
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def readers(weight: ir.Value) -> Iterator[Reader]:
    """Yield the products that read a weight as a matrix."""
    for use in weight.uses():
        node, plain = use.node, use.node.attributes.get_int
        if node.op_type == "MatMul" and use.idx == 1:
            yield Reader(node, transposed=False)
        elif node.op_type == "Gemm" and use.idx == 1 and not plain("transA", 0) and _is_linear(node):
            yield Reader(node, transposed=bool(plain("transB", 0)))


def lookups(weight: ir.Value) -> Iterator[Lookup]:
    """Yield the nodes that look up rows of a weight."""
    for use in weight.uses():
        node = use.node
        numbers = node.inputs[1] if node.op_type == "Gather" and use.idx == 0 else None
        if numbers is not None and numbers.shape is not None and node.attributes.get_int("axis", 0) == 0:
            yield Lookup(node)


def _is_linear(node: ir.Node) -> bool:
    return node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
