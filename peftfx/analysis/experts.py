"""Experts: stacked weights of which each row of values meets one, and the layers that say which.

Rows are sorted by their experts and meet the weights in one grouped product; where each expert's rows end is computed
from the indices that a router's scores gave.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from peftfx.analysis.facts import Analysis, WeightFacts
from peftfx.sites.site import EXPERTS


def find_routers(analysis: Analysis) -> Iterator[WeightFacts]:
    """The linear layers that the ends of a grouped product's groups come from, once each, by one walk back."""
    ends = [found.op.args[2] for found in analysis.occurrences() if found.kind == EXPERTS]
    todo = [node for node in ends if isinstance(node, fx.Node)]
    seen = set(todo)
    while todo:
        node = todo.pop()
        weight = analysis.owner.get(node)
        if weight is not None:
            yield weight
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        todo += new
        seen.update(new)
