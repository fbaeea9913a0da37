"""The user's own passes in an export: run them on the graphs, and choose what the result is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from peftfx.errors import PeftfxError, first_line
from peftfx.export.deployment.deployment import Deployment
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.verification.comparison import Shown, reference_of
from peftfx.export.verification.oracle import Oracle
from peftfx.passes.adaptation.evaluate import Evaluate
from peftfx.passes.base import Pass
from peftfx.passes.manager import PassManager
from peftfx.passes.patterns.probe import Probe


def refuse_unfit(passes: Sequence[Pass], way: Deployment) -> None:
    """Refuse passes if adapters are chosen when the graph runs, or stay unmerged in the graph."""
    if passes and not way.merges:
        what = "passes run on a graph whose adapters are merged, or that has none"
        raise PeftfxError(what, ", ".join(map(str, passes)), "leave merge, slots and batched out")


def run_own(passes: Sequence[Pass], parts: Sequence[GraphPart]) -> tuple[list[GraphPart], dict[str, int]]:
    """Run the passes on each part. Return the changed parts, and at how many places each pass changed something.

    Raises:
        PeftfxError: a pass changes nothing, fails, or leaves an invalid graph.
    """
    changed = dict.fromkeys(map(str, passes), 0)
    found = []
    for part in parts:
        graph = part.exported
        for step in passes:
            try:
                result = PassManager([step])(graph)
            except PeftfxError:
                raise
            except Exception as error:  # the user's own code may raise any error
                what = f"{type(step).__name__} fails: {type(error).__name__}: {first_line(error)}"
                hint = "see `__cause__` (on the command line: --verbose) for its own report"
                raise PeftfxError(what, str(step), hint) from error
            graph, changed[str(step)] = result.graph, changed[str(step)] + result.changed
        found.append(replace(part, exported=graph))
    if idle := next((step for step in passes if not changed[str(step)]), None):
        near = [miss for part in parts for miss in _misses(idle, part)]
        hint = f"closest: {near[0]}" if near else "leave it out, or export the view that it is for"
        raise PeftfxError("the pass changes nothing in this model", str(idle), hint)
    return found, changed


def _misses(step: Pass, part: GraphPart) -> list[str]:
    explain = getattr(getattr(step, "pattern", None), "explain", None)
    return [] if explain is None else [str(miss) for miss in explain(part.exported)[:1]]


def behind(oracle: Oracle, passes: Sequence[Pass], part: GraphPart) -> Oracle:
    """Return the oracle that an export with these passes is compared with.

    If all passes keep the outputs, the oracle stays as it was. If some add probes, their outputs are added to it. If a
    pass changes outputs, the reference is the graph after the passes.
    """
    added = [step for step in passes if not step.preserves]
    if not added:
        return oracle
    own, ahead = reference_of(Evaluate()(part.exported).graph), oracle.reference
    named = ", ".join(map(str, added))
    if not all(isinstance(step, Probe) for step in added):
        return replace(oracle, reference=own, told=f"the graph behind {named}", eager=None)

    def both(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**own(feed), **ahead(feed)}

    return replace(oracle, reference=both, told=f"{oracle.told}; its graph, for {named}")


def shown_of(part: GraphPart) -> Shown | None:
    """Return what is compared of each output of a part: the values at unmasked tokens, also of added outputs."""
    if part.view is None:
        return None
    own, view = set(onnx_outputs(part.graph)), part.view

    def shown(name: str, feed: dict[str, Tensor], value: Tensor) -> Tensor:
        if name in own:
            return view.shown(name, feed, value)
        mask = feed.get("attention_mask")
        if mask is None or value.ndim < 2 or len(mask) != len(value) or value.shape[1] > mask.shape[1]:
            return value
        return value[mask[:, mask.shape[1] - value.shape[1] :].cpu() != 0]

    return shown
