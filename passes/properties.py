"""The properties, by name, that passes may require of a graph and ensure of their result.

A property is a function that takes a graph and returns what violates the property, or an empty string if it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from peftfx.errors import PeftfxError, nearest
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.graph.rewriter import OVERRIDES, REGION, REPLACES
from peftfx.passes.base import results


@dataclass(frozen=True)
class Property:
    """A property that a graph can have.

    Attributes:
        against: returns what violates the property, with the node or tensor concerned; empty if the property holds.
        hint: what to do if the property does not hold.
    """

    against: Callable[[Graph], str]
    hint: str


def _training(graph: Graph) -> str:
    return "it was captured in train mode" if graph.training else ""


def _adapters(graph: Graph) -> str:
    tags = (node for node in graph.nodes() if REGION in node.meta or OVERRIDES in node.meta)
    found = next((n for n in tags), None) or next(iter(_reads(graph)), None)
    return "" if found is None else f"%{found.name} is an adapter's"


def _read(graph: Graph) -> str:
    found = next(iter(_reads(graph)), None)
    return "" if found is None else f"it reads {found.target}"


def _reads(graph: Graph) -> Iterable[fx.Node]:
    return (n for n in graph.nodes() if n.op == "get_attr" and str(n.target).startswith(f"{ADAPTERS}."))


def _lost(graph: Graph) -> str:
    names = {node.name for node in graph.nodes()}
    for result in results(graph):
        for name in (result.meta[REPLACES], result.meta[REGION].y):
            if name not in names:
                return f"%{result.name} took the place of %{name}, which is gone"
    return ""


def _without_value(graph: Graph) -> str:
    missing = next((name for name in graph.derived if name not in graph.evaluated), None)
    return "" if missing is None else f"{missing} has no value yet"


PROPERTIES: Mapping[str, Property] = {
    "inference": Property(_training, "call model.eval() and capture again"),
    "bare": Property(_adapters, "remove the adapters (Remove), or merge them (Merge)"),
    "merged": Property(_read, "merge the adapters (Merge)"),
    "intact": Property(_lost, "remove or merge adapters ahead of Sweep and Fuse"),
    "evaluated": Property(_without_value, "compute derived weights (Evaluate)"),
}


def check_properties(names: Iterable[str], graph: Graph, what: str) -> None:
    """Check that a graph has the properties `names`.

    Raises:
        PeftfxError: a property does not hold, or no property has this name.
    """
    for name in names:
        if name not in PROPERTIES:
            raise PeftfxError(f"there is no property {name!r}", what, nearest(name, PROPERTIES))
        if against := PROPERTIES[name].against(graph):
            raise PeftfxError(f"{what}: the graph is not {name!r}: {against}", name, PROPERTIES[name].hint)
