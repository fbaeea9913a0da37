"""The base class of passes, which rewrite a graph (`Graph -> PassResult`), and helpers that passes share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.contract.placement import Placement
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import REPLACES
from peftfx.patterns.pattern import Pattern


@dataclass(frozen=True)
class PassResult:
    """The graph that a pass returns, and the number of changed places; with 0, the graph is the input."""

    graph: Graph
    changed: int


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of graphs. Its fields are its options; it never changes its input.

    Attributes:
        preserves: whether the outputs stay the same, which the manager's numeric level checks.
        requires: the names of properties that a graph must have, checked before the pass; see
            `peftfx.passes.properties`.
        ensures: the names of properties that the result has, checked after the pass.
    """

    preserves: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, graph: Graph) -> PassResult:
        """Rewrite a copy of `graph`, and return it."""

    def __str__(self) -> str:
        """Return the pass as text, without options at their defaults, as `peftfx.passes.parse_pass` reads it."""
        return written(self)


def written(value: object) -> str:
    """Return a pass or an option as text. A value that is not plain data or a dataclass, such as a tensor, is `...`."""
    if isinstance(value, Pattern):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.repr and f.init]
        given = [(f.name, getattr(value, f.name)) for f in fields if not _is_default(f, getattr(value, f.name))]
        options = ", ".join(f"{name}={written(own)}" for name, own in given)
        return type(value).__name__ + (f"({options})" if options else "")
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    return repr(value) if isinstance(value, (str, int, float, type(None))) else "..."


def _is_default(field: dataclasses.Field[object], value: object) -> bool:
    if field.default is dataclasses.MISSING:
        return field.default_factory is not dataclasses.MISSING and value == field.default_factory()
    return value is field.default or (isinstance(value, (str, int, float, tuple)) and value == field.default)


@dataclass(frozen=True)
class Region:
    """The tag of the nodes that one insertion added: the adapter, its placement, and the node that they replace."""

    adapter: str
    placement: Placement
    y: str
    params: tuple[tuple[str, str], ...]


def output_nodes(graph: Graph) -> list[fx.Node]:
    """Return the nodes whose values the graph returns."""
    (output,) = (n for n in graph.nodes() if n.op == "output")
    return list(output.args[0])  # type: ignore[arg-type]


def results(graph: Graph) -> list[fx.Node]:
    """Return the result nodes of all insertions, in the order in which the insertions apply."""
    return [n for n in graph.nodes() if REPLACES in n.meta]


def attributes_of(graph: Graph) -> dict[str, fx.Node]:
    """Return the graph's `get_attr` nodes by target."""
    return {str(n.target): n for n in graph.nodes() if n.op == "get_attr"}


def fake_like(anchor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Make a fake tensor with the shape of `real`, in the fake mode and on the device of `anchor`, a node's value."""
    mode = detect_fake_mode([anchor])
    device = anchor.device if mode is None else "meta"
    empty = torch.empty(real.shape, dtype=real.dtype, device=device, requires_grad=real.requires_grad)
    return empty if mode is None else FakeTensor(mode, empty, anchor.device)  # `torch.empty` in the mode takes longer
