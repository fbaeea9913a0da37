"""Pass: how a graph is rewritten, `Graph -> PassResult`; and the manager that runs passes and checks what they did."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx
from torch._guards import detect_fake_mode

from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph

Level = Literal["none", "lint", "metadata", "numeric"]
REGION = "peftfx_region"  #: in `node.meta` of every inserted node: its `Region`
REPLACES = "peftfx_replaces"  #: in `node.meta` of a region's result: the name of the node whose place it took
OVERRIDES = "peftfx_overrides"  #: in `node.meta` of an adapter's tensor: the target of the base's tensor it stands for


@dataclass(frozen=True)
class PassResult:
    """A pass's output graph and how many places it changed; with 0, the graph is the one that went in."""

    graph: Graph
    changed: int


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. Its fields are its options; it never changes its input."""

    preserves = False
    """Whether the outputs stay what they were: what the numeric level checks."""

    @abstractmethod
    def __call__(self, graph: Graph) -> PassResult:
        """Rewrite a copy of `graph`."""

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Region:
    """The tag of the nodes that one insertion added: which adapter, where, and what they replace."""

    adapter: str
    placement: Placement
    y: str
    params: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Timing:
    """What one pass did and what it cost, in seconds of wall time."""

    name: str
    seconds: float
    changed: int


@dataclass
class PassManager:
    """Runs passes in order, checks the graph after each, and keeps the time each took.

    Args:
        passes: what to run.
        check: `lint` checks structure; `metadata` also that shapes and dtypes of the outputs are kept; `numeric` also
            that passes which promise to keep the outputs do (to `tolerance`, relative to the largest output).
        inputs: the tensors that the numeric check runs on, in the graph's order.
    """

    passes: Sequence[Pass]
    check: Level = "lint"
    inputs: Sequence[torch.Tensor] = ()
    tolerance: float = 1e-5
    timings: list[Timing] = field(default_factory=list)

    def __call__(self, graph: Graph) -> Graph:
        """Run every pass; an error inside one names it."""
        if self.check == "numeric" and len(self.inputs) != len(graph.inputs):
            raise PeftfxError(
                "the numeric check needs a tensor for each input", "inputs", "pass PassManager(inputs=...)"
            )
        for step in self.passes:
            before, start = graph, time.perf_counter()
            try:
                result = step(graph)
            except PeftfxError as error:
                raise PeftfxError(f"{step}: {error.what}", error.where, error.hint) from error
            graph = result.graph
            self.timings.append(Timing(str(step), time.perf_counter() - start, result.changed))
            self._verify(step, before, graph)
        return graph

    def _verify(self, step: Pass, before: Graph, after: Graph) -> None:
        if self.check == "none":
            return
        after.lint()
        if self.check in ("metadata", "numeric"):
            for name, old, new in zip(before.outputs, output_nodes(before), output_nodes(after), strict=True):
                want, got = old.meta["val"], new.meta["val"]
                if (want.dtype, str(want.shape)) != (got.dtype, str(got.shape)):
                    kinds = f"{want.dtype} {list(want.shape)} to {got.dtype} {list(got.shape)}"
                    what = f"{step} changed an output from {kinds}"
                    raise PeftfxError(what, name, "this is a fault of the pass")
        if self.check == "numeric" and step.preserves:
            with torch.no_grad():
                pairs = zip(before.outputs, before.run(*self.inputs), after.run(*self.inputs), strict=True)
            for name, want, got in pairs:
                error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-12)) if want.numel() else 0.0
                if not error <= self.tolerance:
                    raise PeftfxError(f"{step} changed an output by {error:.2e}", name, "this is a fault of the pass")


def output_nodes(graph: Graph) -> list[fx.Node]:
    """The nodes that the graph returns."""
    (output,) = (n for n in graph.nodes() if n.op == "output")
    return list(output.args[0])  # type: ignore[arg-type]


def results(graph: Graph) -> list[fx.Node]:
    """The result nodes of all insertions, in the order in which they apply."""
    return [n for n in graph.nodes() if REPLACES in n.meta]


def attribute(graph: fx.Graph, target: str, value: object, attributes: dict[str, fx.Node]) -> fx.Node:
    """The `get_attr` node for a target, made ahead of the graph's first other node when there is none yet."""
    if target not in attributes:
        first = next(n for n in graph.nodes if n.op != "get_attr")
        with graph.inserting_before(first):
            node = graph.create_node("get_attr", target, name=target.replace(".", "_"))
        node.meta["val"] = value
        attributes[target] = node
    return attributes[target]


def attributes_of(graph: Graph) -> dict[str, fx.Node]:
    """The graph's `get_attr` nodes by target."""
    return {str(n.target): n for n in graph.nodes() if n.op == "get_attr"}


def fake_like(anchor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A fake tensor shaped like `real`, in the fake mode and on the device of `anchor`, a node's value."""
    mode = detect_fake_mode([anchor])
    with mode or contextlib.nullcontext():
        return torch.empty(real.shape, dtype=real.dtype, device=anchor.device, requires_grad=real.requires_grad)
