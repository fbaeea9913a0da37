"""Drop operators that cost time without effect: casts to the same dtype, slices of everything, unused values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult
from peftfx.passes.optimization.dead_code import sweep
from peftfx.passes.optimization.functional import make_functional
from peftfx.passes.rewriting.matching import have_one_shape, takes_all

aten = torch.ops.aten
#: Casts, with the position of the argument `copy`.
CASTS = {aten.to.dtype: 3, aten.to.device: 4, aten.to.dtype_layout: 6, aten.to.other: 3}
#: Always views, so a result of the same shape is the same value. A squeeze of an axis that is not of size 1 is one too.
_VIEWS = {aten.expand.default, aten.view.default, aten.squeeze.dim, aten.squeeze.dims}
_SAME = {aten.alias.default, aten.detach.default, aten.detach_.default}
#: Dropouts of whole channels, which give their input itself in inference, and which ONNX does not have.
_DROPOUTS = {aten.feature_dropout.default, aten.feature_alpha_dropout.default}


@dataclass(frozen=True)
class Cleanup(Pass):
    """Drop operators that have no effect in inference. Writes to fresh tensors become operators that return the result.

    Do not use it under autocast: there, a cast to the dtype that a value had at capture may have an effect.
    """

    preserves = True
    requires = ("inference",)

    def __call__(self, graph: Graph) -> PassResult:
        result = graph.clone()
        rewriter = Rewriter(result.module.graph)
        before = len(result.module.graph.nodes)
        stay = [node for node in make_functional(rewriter) if node.target not in _SAME]
        for node in list(result.nodes()):
            if _does_nothing(node) or (_copies(node) and not stay):  # with writes, a copy is not its source
                rewriter.replace(node, source(node))
                rewriter.erase(node)
        sweep(rewriter)
        rewriter.close(result)
        return PassResult(result, before - len(result.module.graph.nodes))


def source(node: fx.Node) -> fx.Node:
    """Return the value that a node with one operand works on."""
    value = node.args[0]
    assert isinstance(value, fx.Node), node
    return value


def _does_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in CASTS:
        return _is_same_type(node)
    if takes_all(node):
        return True
    if node.target in _VIEWS:
        return have_one_shape(node, source(node))
    return node.target in _SAME or (node.target in _DROPOUTS and node.args[2] is False)


def _copies(node: fx.Node) -> bool:
    return node.target is aten.lift_fresh_copy.default or _is_neutral(node)


def _is_neutral(node: fx.Node) -> bool:
    """Say whether a node is `x * 1`, or `x + 0` for integers (which have no negative zero), of x's own dtype."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = source(node).meta.get("val"), node.meta.get("val")
    if node.kwargs or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    number = {aten.mul.Tensor: 1, aten.add.Tensor: None if before.dtype.is_floating_point else 0}.get(node.target)  # type: ignore[call-overload]
    return (
        number is not None
        and isinstance(node.args[1], (int, float))
        and node.args[1] == number
        and before.dtype == after.dtype
    )


def _is_same_type(node: fx.Node) -> bool:
    position = CASTS[node.target]  # type: ignore[index]
    copies = node.kwargs.get("copy", node.args[position] if len(node.args) > position else False)
    before, after = source(node).meta.get("val"), node.meta.get("val")
    if copies or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return bool(before.dtype == after.dtype and before.device == after.device)
