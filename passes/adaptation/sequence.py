"""Trace a sequence method's virtual tokens as a graph of its parameters, which fills the hole of an entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.graph.graph import CONSTANTS
from peftfx.graph.trace import trace
from peftfx.views.entry import HOLE

TARGET = f"{CONSTANTS}.{HOLE}"  #: the `get_attr` target of the entry's hole


def trace_virtual(
    method: SequenceMethod, hole: Tensor, names: Sequence[str], params: Sequence[Tensor], *, training: bool
) -> fx.GraphModule:
    """Trace what fills the hole as a graph of the parameters. The result has the hole's shape and dtype."""

    def fill(*values: Tensor) -> Tensor:
        return method.virtual(dict(zip(names, values, strict=True)), training).to(hole.dtype)

    traced = trace(fill, params, f"{type(method).__name__}.virtual", "virtual")
    (output,) = traced.graph.find_nodes(op="output")
    value = output.args[0].meta["val"]
    if tuple(value.shape) != tuple(hole.shape):
        what = f"{type(method).__name__}.virtual gives {list(value.shape)}, and its entry takes {list(hole.shape)}"
        raise PeftfxError(what, "virtual", "return the shape that the method's entry has")
    return traced


def first_operation(graph: fx.Graph) -> fx.Node:
    """Return the first node that computes something. Only inputs and weights come before it."""
    return next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
