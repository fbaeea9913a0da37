"""Checks of a call's sides: a program that has one side of a branch on its inputs refuses calls of the other side.

The check reads the only element of a vector at index 0, or at index 1 for a call of the other side: ONNX Runtime's CPU
provider then stops with an error. Providers that do not check an index give 0 there. All outputs are divided by the
element, so there they are infinite or no numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from peftfx.graph.decisions import Decision
from peftfx.graph.graph import CONSTANTS, Graph
from peftfx.graph.places import twin
from peftfx.graph.rewriter import Cursor, Rewriter

_aten = torch.ops.aten


def checked(graph: Graph, sides: Sequence[Decision]) -> Graph:
    """Return a graph that fails for inputs that take the other side of a branch.

    Args:
        graph: the graph; it is not changed.
        sides: the branches, with the sides that the graph has.
    """
    if not sides:
        return graph
    graph = graph.clone()
    graph.module.add_module(CONSTANTS, twin(graph.module.get_submodule(CONSTANTS)))  # other graphs share it
    rewriter = Rewriter(graph.module.graph)
    places = list(rewriter.graph.find_nodes(op="placeholder"))
    named = {spec.name: node for spec, node in zip(graph.inputs, places, strict=True)}
    at = rewriter.before(next(n for n in graph.nodes() if n.op not in ("placeholder", "get_attr")))
    divisor: fx.Node | None = None
    with detect_fake_mode([node.meta["val"] for node in places]) or nullcontext():
        for side in sides:
            element = _element(at, side, [named[name] for name in side.inputs], graph.module)
            divisor = element if divisor is None else at.call(_aten.mul.Tensor, divisor, element)
    (output,) = rewriter.graph.find_nodes(op="output")
    end = rewriter.before(output)
    returned = [_divided(end, value, divisor) for value in output.args[0]]
    output.args = (tuple(returned),)
    rewriter.close(graph)
    return graph


def _element(at: Cursor, side: Decision, operands: list[fx.Node], module: fx.GraphModule) -> fx.Node:
    """Return the node that is 1 for a call of this side, and fails or is 0 for others.

    The constants of the side's program are added to the module's own.
    """
    copies = dict(zip(side.program.graph.find_nodes(op="placeholder"), operands, strict=True))
    (end,) = side.program.graph.find_nodes(op="output")
    with enable_python_dispatcher():  # some operators, such as a padding, compute with free sizes only inside
        for node in side.program.graph.nodes:
            if node.op == "get_attr":
                copies[node] = _constant(at.rewriter, node, side, module)
            elif node.op not in ("placeholder", "output"):
                copies[node] = at.copy(node, copies, anew=True)
    other = at.call(_aten.ne.Scalar, copies[end.args[0]], side.answer)
    index = at.call(_aten.reshape.default, at.call(_aten.to.dtype, other, torch.int64), [1])
    one = at.call(_aten.ones.default, [1])
    return at.call(_aten.squeeze.dim, at.call(_aten.index_select.default, one, 0, index), 0)


def _constant(rewriter: Rewriter, node: fx.Node, side: Decision, module: fx.GraphModule) -> fx.Node:
    """Return the node that reads a constant of a side's program in the graph."""
    name = f"side_{str(node.target).rpartition('.')[2]}"
    value = operator.attrgetter(str(node.target))(side.program)
    module.get_submodule(CONSTANTS).register_buffer(name, value)
    # The side's program was captured by itself: its tensors are of another fake mode than the graph's.
    return rewriter.attribute(f"{CONSTANTS}.{name}", torch.empty(value.shape, dtype=value.dtype))


def _divided(at: Cursor, value: object, divisor: fx.Node | None) -> object:
    seen = value.meta["val"] if isinstance(value, fx.Node) else None
    if not isinstance(seen, Tensor) or not seen.is_floating_point():
        return value
    return at.call(_aten.div.Tensor, value, at.call(_aten.to.dtype, divisor, seen.dtype))
