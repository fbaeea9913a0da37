"""Analysis: the facts about a graph that are collected while the roles of its weights are found."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx

from peftfx.analysis.attentions import Attention
from peftfx.analysis.dataflow import Flow
from peftfx.analysis.rows import RowTracer
from peftfx.analysis.weight_ops import Occurrence
from peftfx.graph.graph import Graph
from peftfx.sites.site import Part


@dataclass
class WeightFacts:
    """All occurrences of one module's weight, with the role and parts found so far."""

    occurrences: list[Occurrence]
    role: str = ""
    parts: tuple[Part, ...] = ()


@dataclass
class Analysis:
    """The facts about a graph that are collected while roles are found."""

    graph: Graph
    weights: dict[tuple[str, str], WeightFacts]
    owner: dict[fx.Node, WeightFacts]
    flows: Mapping[fx.Node, Flow]
    attentions: list[Attention]
    readers: dict[fx.Node, list[tuple[Occurrence, int]]] = field(default_factory=lambda: defaultdict(list))

    def occurrences(self) -> Iterator[Occurrence]:
        return itertools.chain.from_iterable(weight.occurrences for weight in self.weights.values())

    def tracer(self, op: fx.Node) -> RowTracer:
        found = next(o for o in self.owner[op].occurrences if o.op is op)
        return RowTracer(self.graph, self.flows, op, *found.features)
