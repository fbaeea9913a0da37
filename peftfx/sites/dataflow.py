"""Dataflow: the connections between the sites of a graph, as plain data. `peftfx.sites.network` builds on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftfx.sites.site import Site

INPUT, JOIN, OUTPUT = "input", "join", "output"


@dataclass(frozen=True)
class Junction:
    """A node of the network that is not a site.

    Attributes:
        name: the name of the input or output, or of a join's node in the graph.
        kind: input, join or output.
        path: the module that computes the join.
    """

    name: str
    kind: str
    path: str = ""


@dataclass(frozen=True)
class Link:
    """A connection from a node to another node that reads its value.

    Attributes:
        source, target: numbers of nodes: first the sites in order, then the junctions.
        ops: names of the operators between the two nodes, in the order in which they first run.
    """

    source: int
    target: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Dataflow:
    """The junctions and links between the sites of a graph."""

    junctions: tuple[Junction, ...] = ()
    links: tuple[Link, ...] = ()


def keys_of(sites: Sequence[Site]) -> list[str]:
    """Return a name for each site: its path. An attention whose path is also that of a weight gets another name."""
    weighted = {site.path for site in sites if site.kind != "attention"}
    return [f"{s.path}:attention" if s.kind == "attention" and s.path in weighted else s.path for s in sites]
