"""Logarithms that are rounded to whole numbers, such as places in a table of relative positions.

Where a result is nearly whole, the last bit of a float32 logarithm decides which number it becomes, and ONNX Runtime's
last bit is not always torch's. So such a logarithm is computed in float64 and rounded to float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.optimization.cleanup import CASTS

aten = torch.ops.aten
_ROUNDS = {aten.ceil.default, aten.floor.default, aten.round.default, aten.trunc.default}
_LOGS = {aten.log.default, aten.log2.default, aten.log10.default}
_BETWEEN = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.add.Scalar),
    *(aten.sub.Tensor, aten.sub.Scalar, aten.neg.default, aten.abs.default),
}


def widen_rounded_logs(rewriter: Rewriter, graph: Graph) -> None:
    """Compute the float32 logarithms of a graph in float64 if their results are rounded to whole numbers."""
    found = dict.fromkeys(log for node in graph.nodes() if _rounds(node) for log in _logs(node.all_input_nodes))
    for log in found:
        at = rewriter.before(log)
        wide = at.call(log.target, at.call(aten._to_copy.default, log.args[0], dtype=torch.float64))
        rewriter.replace(log, at.call(aten._to_copy.default, wide, dtype=torch.float32))
        rewriter.erase(log)


def _rounds(node: fx.Node) -> bool:
    if node.target in _ROUNDS:
        return True
    value, read = node.meta.get("val"), [n.meta.get("val") for n in node.all_input_nodes[:1]]
    return (
        node.target in CASTS
        and isinstance(value, Tensor)
        and not value.is_floating_point()
        and any(isinstance(v, Tensor) and v.is_floating_point() for v in read)
    )


def _logs(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """Yield the float32 logarithms from which values are computed, number by number."""
    seen, waiting = set[fx.Node](), list(nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _LOGS and node.meta["val"].dtype == torch.float32:
            yield node
        elif node.target in _BETWEEN:
            waiting += node.all_input_nodes
