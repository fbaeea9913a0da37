"""Matching: whether a node of a graph computes what a spelling computes, told from its operands backwards.

Sums and products match with their operands in either order; casts and copies are looked through on both sides; sizes
are passed by at first, and compared behind that with a trace of the function at the very sizes of the match.
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
"""Of spellings at the sizes of matches; None where the function cannot be run at these."""


def match_at(spelling: Spelling, node: fx.Node, trail: Trail, traces: Traces) -> Match | None:
    """Whether this node ends a match of a spelling.

    Args:
        spelling: what is looked for.
        node: of the graph.
        trail: is told how far it came.
        traces: of the search of one graph: matches of equal sizes share one.
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
    """Tensors of which no two are one: a trace tells its inputs apart by identity."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        known = any(value is other for other in found.values())
        found[name] = torch.ops.aten.alias.default(value) if known else value
    return found


def _end(program: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that has the function's value: behind a cast where the function ends in one."""
    (output,) = program.graph.find_nodes(op="output")
    (user, *others) = node.users or (node,)
    ends = not others and copied_from(user) is node and user.meta["val"].dtype == output.args[0].meta["val"].dtype
    return user if ends and copied_from(output.args[0]) is not None else node


def refuse_own(error: Exception, name: str) -> PeftfxError:
    """That a pattern's condition failed with an error of its own."""
    what = f"the condition of the pattern {name} failed with {type(error).__name__}: {error}"
    return PeftfxError(what, "where", "it gets a Match: operands, numbers, value(name), weight(name)")
