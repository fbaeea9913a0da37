"""Run passes, check what each pass requires and ensures, and measure the time. The manager is a pass, too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.passes.base import Pass, PassResult, output_nodes
from peftfx.passes.properties import check_properties

Level = Literal["none", "lint", "metadata", "numeric"]


@dataclass(frozen=True)
class Timing:
    """The number of changes that one pass made, and its wall time in seconds."""

    name: str
    seconds: float
    changed: int


@dataclass(frozen=True)
class PassManager(Pass):
    """Runs passes in order, checks the graph before and after each pass, and measures the time of each pass.

    Args:
        passes: the passes to run; a manager may be one of them.
        check: `none` checks nothing. `lint` checks what passes require and ensure, and the graph's structure.
            `metadata` also checks that the outputs keep their shapes and dtypes. `numeric` also checks that passes
            which promise to preserve the outputs do so (within `tolerance`, relative to the largest output).
        inputs: the tensors that the numeric check runs on, in the graph's order.
        timings: the timings of all passes run so far.
    """

    passes: Sequence[Pass]
    check: Level = "lint"
    inputs: Sequence[torch.Tensor] = field(default=(), compare=False)
    tolerance: float = 1e-5
    timings: list[Timing] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Store the passes as a tuple, so that managers can be compared."""
        object.__setattr__(self, "passes", tuple(self.passes))

    @property
    def preserves(self) -> bool:  # type: ignore[override]
        """Whether all passes preserve the outputs."""
        return all(step.preserves for step in self.passes)

    @property
    def requires(self) -> tuple[str, ...]:  # type: ignore[override]
        """The properties that the first pass requires."""
        return self.passes[0].requires if self.passes else ()

    @property
    def ensures(self) -> tuple[str, ...]:  # type: ignore[override]
        """The properties that the last pass ensures."""
        return self.passes[-1].ensures if self.passes else ()

    def __call__(self, graph: Graph) -> PassResult:
        """Run every pass on `graph`.

        Raises:
            PeftfxError: a pass fails (the message names a user's own), or a property is missing before or after a pass.
        """
        if self.check == "numeric" and len(self.inputs) != len(graph.inputs):
            raise PeftfxError(
                "the numeric check needs a tensor for each input", "inputs", "pass PassManager(inputs=...)"
            )
        changed = 0
        for step in self.passes:
            before = graph
            if self.check != "none":
                check_properties(step.requires, graph, f"{step} cannot run")
            told, wanted = self._ahead(graph, step)
            start = time.perf_counter()
            try:
                result = step(graph)
            except PeftfxError as error:
                raise PeftfxError(f"{_known_as(step)}{error.what}", error.where, error.hint) from error
            graph, changed = result.graph, changed + result.changed
            self.timings.append(Timing(str(step), time.perf_counter() - start, result.changed))
            if told is not None and before.text() != told:
                hint = "a pass rewrites a copy: Rewriter(graph) makes one"
                raise PeftfxError(f"{step} changed the graph that it was given", "graph", hint)
            self._verify(step, before, graph, wanted)
        return PassResult(graph, changed)

    def _ahead(self, graph: Graph, step: Pass) -> tuple[str | None, Sequence[torch.Tensor]]:
        """Return what a numeric check needs from a graph before a pass could change it: its text and outputs."""
        if self.check != "numeric":
            return None, ()
        with torch.no_grad():
            return graph.text(), graph.run(*self.inputs) if step.preserves else ()

    def _verify(self, step: Pass, before: Graph, after: Graph, wanted: Sequence[torch.Tensor]) -> None:
        if self.check == "none":
            return
        try:
            after.lint()
        except PeftfxError as found:
            what = f"{step} left a graph that is not sound: {found.what}"
            raise PeftfxError(what, found.where, found.hint) from found
        check_properties(step.ensures, after, f"{step} did not do what it says")
        if self.check in ("metadata", "numeric"):
            for name, old, new in zip(before.outputs, output_nodes(before), output_nodes(after), strict=True):
                want, got = old.meta["val"], new.meta["val"]
                if (want.dtype, str(want.shape)) != (got.dtype, str(got.shape)):
                    kinds = f"{want.dtype} {list(want.shape)} to {got.dtype} {list(got.shape)}"
                    what = f"{step} changed an output from {kinds}"
                    raise PeftfxError(what, name, "this is a fault of the pass")
        if self.check == "numeric" and step.preserves:
            with torch.no_grad():
                pairs = zip(before.outputs, wanted, after.run(*self.inputs), strict=True)
            for name, want, got in pairs:
                error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-12)) if want.numel() else 0.0
                if not error <= self.tolerance:
                    raise PeftfxError(f"{step} changed an output by {error:.2e}", name, "this is a fault of the pass")


def _known_as(step: Pass) -> str:
    """Return the beginning of a message: the name of a user's pass. What a pass of peftfx says needs none."""
    return "" if type(step).__module__.startswith("peftfx.") else f"{step}: "
