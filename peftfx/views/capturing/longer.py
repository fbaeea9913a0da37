"""Longer examples: a size computed from the example's may be 1 only because the example is short.

Attention over windows cuts a text into windows. If a short example has one window, torch takes this 1 for a property of
the model, as it does for an axis of size 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import sympy

from peftfx.errors import PeftfxError
from peftfx.graph.conditions import Condition, unmet
from peftfx.graph.graph import Graph


def with_longer(captured: Callable[[Mapping[str, int]], Graph], serves: Callable[[Graph], bool]) -> Graph:
    """Return the graph of a model, captured at sizes for which no computed size is 1, if that graph serves the example.

    Args:
        captured: captures the model at the example's sizes, except for these sizes of named axes.
        serves: says whether a graph is seen to give what the model's own code gives for the example.
    """
    graph = captured({})
    ones = [condition for condition in graph.conditions if _is_one(condition)]
    others = [condition for condition in graph.conditions if condition not in ones]
    lengths: dict[str, int] = {}
    for one in ones:
        (axis,) = one.axes
        longer = (sizes[axis] for sizes in one.tried() if not one.met(sizes) and sizes[axis] > graph.sizes[axis])
        size = next((size for size in longer if not unmet(others, {**graph.sizes, axis: size})), 0)
        lengths[axis] = max(lengths.get(axis, 0), size)
    lengths = {axis: length for axis, length in lengths.items() if length}
    if not lengths:
        return graph
    try:
        found = captured(lengths)
    except PeftfxError:  # the model's code does not take so many
        return graph
    if not graph.sizes.keys() <= found.sizes.keys():  # at that size the code fixes an axis
        return graph
    more = [c for c in found.conditions if not c.code and any(_opposes(c, one) for one in ones)]
    kept = tuple(c for c in found.conditions if c not in more)
    found = dataclasses.replace(found, conditions=kept, sizes={**found.sizes, **graph.sizes})
    right = not unmet(kept, graph.sizes) and (not more or serves(found))
    return found if right else graph


def _is_one(condition: Condition) -> bool:
    """Return whether a condition says that a size is 1 that torch's operators see, and that one axis decides."""
    if condition.code or len(condition.axes) != 1 or not isinstance(condition.holds, sympy.Eq):
        return False
    return sympy.Integer(1) in condition.holds.args and not any(a.is_Symbol for a in condition.holds.args)


def _opposes(condition: Condition, one: Condition) -> bool:
    """Return whether a condition says of a size that it is more than 1."""
    tried = (*condition.tried(), *one.tried())
    return condition.axes == one.axes and all(condition.met(sizes) != one.met(sizes) for sizes in tried)
