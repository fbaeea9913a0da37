"""Matching: decides whether a node of a graph computes what a spelling computes, from its operands backwards.

Sums and products match with their operands in either order. Casts and copies are ignored on both sides. Sizes are
ignored at first; then the match is compared with a trace of the function at exactly its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from peftfx.errors import PeftfxError
from peftfx.patterns.match import Bound, Match, Trail, copied_from, uncast
from peftfx.patterns.matcher import Matcher
from peftfx.patterns.spelling import Spelling

Traces = dict[tuple[int, str, str], fx.GraphModule | None]
"""Traces of spellings at the sizes of matches; None if the function cannot run at these sizes."""


def match_at(spelling: Spelling, node: fx.Node, trail: Trail, traces: Traces) -> Match | None:
    """Return the match of a spelling that ends at this node, or None.

    Args:
        spelling: the spelling that is searched for.
        node: the graph's node.
        trail: records how far the search came.
        traces: the traces of the search of one graph; matches of equal sizes share a trace.
    """
    loose = Matcher(spelling.program, spelling.numbers, trail, strict=False)
    for bound in loose.at(node):
        inputs = spelling.program.graph.find_nodes(op="placeholder")
        operands = {name: bound.nodes[p] for name, p in zip(spelling.tensors, inputs, strict=True)}
        made = _exact(spelling, operands, bound, node, trail, traces)
        if made is not None:
            return made
    return None


def _exact(
    spelling: Spelling,
    operands: Mapping[str, fx.Node],
    bound: Bound,
    node: fx.Node,
    trail: Trail,
    traces: Traces,
) -> Match | None:
    values = {name: n.meta["val"] for name, n in operands.items()}
    shapes = [(v.dtype, str(tuple(v.shape))) for v in values.values()]
    key = (id(spelling), str(shapes), str(sorted(bound.numbers.items())))
    if key not in traces:
        try:
            traces[key] = spelling.again(_apart(values), bound.numbers)
        except Exception:  # the user's function refuses these sizes
            traces[key] = None
    program = traces[key]
    if program is None:
        trail.ended(bound.matched, node, "the function cannot be run on the sizes that it has there")
        return None
    strict = Matcher(program, {}, trail, strict=True)
    inputs = program.graph.find_nodes(op="placeholder")
    wanted = {p: operands[name] for p, name in zip(inputs, spelling.tensors, strict=True)}
    for exact in strict.at(node):
        if all(uncast(exact.nodes[p]) is uncast(n) for p, n in wanted.items() if p in exact.nodes):
            inner = {n for p, n in exact.nodes.items() if p.op != "placeholder" and isinstance(n.meta["val"], Tensor)}
            ordered = tuple(sorted({*inner, node}))
            return Match(_end(program, node), operands, dict(bound.numbers), ordered, spelling)
    return None


def _apart(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors such that no two are the same object: a trace identifies its inputs by identity."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        known = any(value is other for other in found.values())
        found[name] = torch.ops.aten.alias.default(value) if known else value
    return found


def _end(program: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node that has the function's value: the cast after `node`, if the function ends in a cast."""
    (output,) = program.graph.find_nodes(op="output")
    (user, *others) = node.users or (node,)
    ends = not others and copied_from(user) is node and user.meta["val"].dtype == output.args[0].meta["val"].dtype
    return user if ends and copied_from(output.args[0]) is not None else node


def refuse_own(error: Exception, name: str) -> PeftfxError:
    """Return the error for a pattern's condition that failed with an error of its own."""
    what = f"the condition of the pattern {name} failed with {type(error).__name__}: {error}"
    return PeftfxError(what, "where", "it gets a Match: operands, numbers, value(name), weight(name)")
