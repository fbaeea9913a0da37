"""Dataflow: what is between the sites of a graph, as plain data; `peftfx.sites.network` makes a network of it."""

from __future__ import annotations

from dataclasses import dataclass

INPUT, JOIN, OUTPUT = "input", "join", "output"


@dataclass(frozen=True)
class Junction:
    """A node of the network that is no site.

    Attributes:
        name: of the input or output; of a join, its node's in the graph.
        kind: input, join or output.
        path: the module that joins.
    """

    name: str
    kind: str
    path: str = ""


@dataclass(frozen=True)
class Link:
    """What one node gives and another reads.

    Attributes:
        source, target: numbers of nodes: the sites in order, and behind them the junctions.
        ops: names of the operators on the way, in the order in which they first run.
    """

    source: int
    target: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Dataflow:
    """What is between the sites of a graph."""

    junctions: tuple[Junction, ...] = ()
    links: tuple[Link, ...] = ()
