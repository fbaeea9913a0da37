"""Pass: how a graph is rewritten, `Graph -> PassResult`; what it asks of a graph, and what it promises."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._guards import detect_fake_mode

from peftfx.contract.placement import Placement
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import REPLACES
from peftfx.patterns.pattern import Pattern


@dataclass(frozen=True)
class PassResult:
    """A pass's output graph and how many places it changed; with 0, the graph is the one that went in."""

    graph: Graph
    changed: int


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. Its fields are its options; it never changes its input.

    Attributes:
        preserves: whether the outputs stay what they were: what the manager's numeric level checks.
        requires: names of properties that a graph must have, checked ahead of it; see `peftfx.passes.properties`.
        ensures: names of properties that its result has, checked behind it.
    """

    preserves: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, graph: Graph) -> PassResult:
        """Rewrite a copy of `graph`."""

    def __str__(self) -> str:
        """The pass with its options, those at their defaults left out: what `peftfx.passes.parse_pass` reads."""
        return written(self)


def written(value: object) -> str:
    """A pass or an option as text. What is neither plain data nor a record of it, a tensor say, is `...`."""
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
    """The tag of the nodes that one insertion added: which adapter, where, and what they replace."""

    adapter: str
    placement: Placement
    y: str
    params: tuple[tuple[str, str], ...]


def output_nodes(graph: Graph) -> list[fx.Node]:
    """The nodes that the graph returns."""
    (output,) = (n for n in graph.nodes() if n.op == "output")
    return list(output.args[0])  # type: ignore[arg-type]


def results(graph: Graph) -> list[fx.Node]:
    """The result nodes of all insertions, in the order in which they apply."""
    return [n for n in graph.nodes() if REPLACES in n.meta]


def attributes_of(graph: Graph) -> dict[str, fx.Node]:
    """The graph's `get_attr` nodes by target."""
    return {str(n.target): n for n in graph.nodes() if n.op == "get_attr"}


def fake_like(anchor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A fake tensor shaped like `real`, in the fake mode and on the device of `anchor`, a node's value."""
    mode = detect_fake_mode([anchor])
    with mode or contextlib.nullcontext():
        return torch.empty(real.shape, dtype=real.dtype, device=anchor.device, requires_grad=real.requires_grad)
