"""Outputs that a sigmoid makes.

ONNX Runtime's Sigmoid is within 1.7e-7 of the function, whatever the value: it is 0 for inputs below -18. That is
little for a probability, but much beside an output whose numbers are all nearly zero.
"""

from __future__ import annotations

import torch
from torch import fx

from peftfx.export.translation.program import onnx_outputs
from peftfx.graph.graph import Graph

aten = torch.ops.aten
_SIGMOIDS = frozenset({aten.sigmoid.default, aten.sigmoid_.default})
#: Operators that only move numbers, beside views.
_MOVES = frozenset(
    {
        *(aten.cat.default, aten.stack.default, aten.clone.default, aten._to_copy.default, aten._unsafe_view.default),
        *(aten.gather.default, aten.index.Tensor, aten.index_select.default, aten.where.self, aten.reshape.default),
    }
)


def made_by_sigmoids(graph: Graph) -> frozenset[str]:
    """Return the names of the outputs that hold a sigmoid's numbers, moved at most."""
    (results,) = graph.module.graph.output_node().args
    assert isinstance(results, list | tuple)
    seen: dict[fx.Node, bool] = {}
    return frozenset(
        name
        for name, node in zip(onnx_outputs(graph), results, strict=True)
        if isinstance(node, fx.Node) and _from_sigmoid(node, seen)
    )


def _from_sigmoid(node: fx.Node, seen: dict[fx.Node, bool]) -> bool:
    if node not in seen:
        seen[node] = node.target in _SIGMOIDS or (
            _moves(node) and any(_from_sigmoid(source, seen) for source in node.all_input_nodes)
        )
    return seen[node]


def _moves(node: fx.Node) -> bool:
    target = node.target
    return target in _MOVES or (isinstance(target, torch._ops.OpOverload) and target.is_view)
