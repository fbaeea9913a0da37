"""Computed biases: a layer whose bias a model's code computes becomes the layer without one, and a sum.

`F.linear(x, self.qkv.weight, torch.cat([self.q_bias, zeros, self.v_bias]))` applies a weight of the model, so it is a
site. An adapter of the weight must not act on such a bias: DoRA scales the layer's product alone.
"""

from __future__ import annotations

import torch
from torch import fx

from peftfx.analysis.stored_weights import parameter_of
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
_CONVS = {_aten.conv1d.default: 1, _aten.conv2d.default: 2, _aten.conv3d.default: 3}  #: with their axes of places


def add_computed_biases(graph: fx.Graph) -> None:
    """Add the biases that are no parameters behind the layers of the model's weights, in place."""
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        if node.target is not _aten.linear.default and node.target not in _CONVS:
            continue
        x, weight, *more = node.args
        bias = more[0] if more else None
        if not isinstance(bias, fx.Node) or parameter_of(bias) is not None or parameter_of(weight) is None:
            continue
        rewriter.update(node, node.target, x, weight, *([None, *more[1:]] if more[1:] else []))
        at = rewriter.after(node)
        if node.target in _CONVS:
            bias = at.call(_aten.reshape.default, bias, [-1, *[1] * _CONVS[node.target]])
        rewriter.extend(node, at.call(_aten.add.Tensor, node, bias))
