"""Blocks: code that fills up a last block that is not whole gives the same for a whole one, if its rest is the block.

Such code branches on `size % block > 0`, pads by `block - size % block`, and hides what it added. A graph that is
captured with a rest has this branch. With `(size - 1) % block + 1` in place of the rest, which is equal where there is
a rest, it adds nothing to a whole block. Whether that is what the code's other branch does, the trials of an export
find. Code that computes how much to add, `-size % block`, adds nothing to a whole block as it is.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Mod, PythonMod

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter


def with_whole_blocks(graph: Graph) -> Graph:
    """Return a graph in which a size's rest that its conditions say to be more than 0 is a block in place of 0.

    The graph is changed in place. At the sizes of its conditions it computes the same.
    """
    rests = {
        rest
        for condition in graph.conditions
        for rest in condition.holds.atoms(Mod, PythonMod)
        if condition.holds in (sympy.Gt(rest, 0), sympy.Ne(rest, 0)) and _of_size(rest)
    }
    if not rests:
        return graph
    axes, rewriter = _axes(graph), Rewriter(graph.module.graph)
    for node in list(graph.nodes()):
        if node.target is not operator.mod or type(node.args[1]) is not int:
            continue
        size, block = node.args
        value = node.meta.get("val")
        if isinstance(size, fx.Node) and isinstance(value, torch.SymInt) and value.node.expr.xreplace(axes) in rests:
            at = rewriter.after(node)
            rest = at.call(operator.mod, at.call(operator.sub, size, 1), block)
            rewriter.replace(node, at.call(operator.add, rest, 1, value=value))
    rewriter.close(graph)
    return graph


def _of_size(rest: sympy.Basic) -> bool:
    """Return whether a rest is that of a size, and not of a negative number or of what another rest leaves."""
    size = rest.args[0]
    return not size.could_extract_minus_sign() and not size.has(Mod, PythonMod)


def _axes(graph: Graph) -> dict[sympy.Basic, sympy.Symbol]:
    """Return the axis of each symbol of a size, as conditions name it."""
    found: dict[sympy.Basic, sympy.Symbol] = {}
    inputs = [node for node in graph.nodes() if node.op == "placeholder"]
    for spec, node in zip(graph.inputs, inputs, strict=True):
        for axis, size in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(axis, str) and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[size.node.expr] = sympy.Symbol(axis, integer=True, positive=True)
    return found
