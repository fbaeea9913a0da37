"""Graphs that are a little wrong."""

from __future__ import annotations

import pytest
import torch

from peftfx.export.deployment.parts import GraphPart
from peftfx.export.steps import steps
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import REGION, Rewriter

_aten = torch.ops.aten


def one_percent_more(graph: Graph) -> Graph:
    """Make the output of one layer larger by one percent, in place."""
    rewriter = Rewriter(graph.module.graph)
    layer = [n for n in graph.nodes() if n.target is _aten.linear.default and REGION not in n.meta][-2]
    rewriter.extend(layer, rewriter.after(layer).call(_aten.mul.Tensor, layer, 1.01))
    graph.module.recompile()
    return graph


def spoil_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each capture of an export be off by one percent at one layer."""
    captured = steps.ExportSteps.captured

    def spoiled(self: steps.ExportSteps) -> tuple[steps.ExportSteps, list[GraphPart]]:
        work, parts = captured(self)
        for part in parts:
            one_percent_more(part.graph)
        return work, parts

    monkeypatch.setattr(steps.ExportSteps, "captured", spoiled)
