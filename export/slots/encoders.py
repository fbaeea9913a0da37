"""Encoders of images and sounds beside texts whose rows choose adapters.

A call of a graph of images has one image, so one adapter acts in the whole graph, if any: that of the row that the
image is in. Its number is an input, `adapter_ids` [1]. A graph of sounds gets all sounds of a call without the texts
that they are in. Nothing tells their rows, so no adapter may act there.
"""

from __future__ import annotations

import dataclasses

from peftfx.errors import PeftfxError
from peftfx.export.deployment.parts import GraphPart, refuse_fixed
from peftfx.graph.graph import BASE, Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.optimization.dead_code import Sweep
from peftfx.passes.slots.by_row import ByRow
from peftfx.views.images.encoded import VISION
from peftfx.views.images.videos import VIDEO
from peftfx.views.sounds.encoded import AUDIO
from peftfx.views.view import View

ENCODED_APART = frozenset({VISION, VIDEO, AUDIO})  #: the names of views that encode what is beside a text


def encoder_by_row(adapted: AdaptedModel, file: str, view: View, by_row: ByRow, hint: str) -> GraphPart:
    """Capture a view that encodes images or sounds, with the choice of an adapter if one acts there.

    Args:
        adapted: the model. No adapter is active.
        file: the name of the file.
        view: the view.
        by_row: what adds the choice to the graphs of texts.
        hint: what else can be exported.

    Raises:
        PeftfxError: an adapter acts where sounds are encoded, or does something that cannot be chosen.
    """
    graph = adapted.graph(view=view)
    refuse_fixed(graph, view.axes)
    place = _acting(graph, by_row)
    if not place:
        return GraphPart(file, view, graph, graph)
    if view.name == AUDIO:
        what = "an adapter acts in the sound encoder, and nothing says which row each sound is in"
        raise PeftfxError(what, place, f"use adapters of the text's layers alone; or {hint}")
    chosen = dataclasses.replace(by_row, whole=True)(graph).graph
    return GraphPart(file, view, chosen, chosen)


def _acting(graph: Graph, by_row: ByRow) -> str:
    """Return the path of a module in which adapters act and whose result the graph uses; empty if there is none."""
    changed, live = {path for path, _ in by_row.stacks}, {node.name for node in Sweep()(graph).graph.nodes()}
    for site in graph.sites:
        tensors = {str(name).removeprefix(f"{BASE}.") for name in (site.weight, site.bias) if name}
        runs = any(call.op in live for call in site.calls)
        if runs and (site.path in changed or not tensors.isdisjoint(changed)):
            return site.path
    return ""
