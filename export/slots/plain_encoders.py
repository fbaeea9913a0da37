"""Encoders of images and sounds beside texts whose rows choose adapters: no adapter may act in them.

A graph of images or sounds gets them without the text that each is in, so nothing tells the row, and its adapter.
"""

from __future__ import annotations

from collections.abc import Collection

from peftfx.errors import PeftfxError
from peftfx.export.deployment.parts import GraphPart, refuse_fixed
from peftfx.graph.graph import BASE
from peftfx.model.adapted import AdaptedModel
from peftfx.views.images.encoded import VISION
from peftfx.views.sounds.encoded import AUDIO
from peftfx.views.view import View

ENCODED_APART = frozenset({VISION, AUDIO})  #: the names of views that encode what is beside a text


def plain_encoder(adapted: AdaptedModel, file: str, view: View, changed: Collection[str], hint: str) -> GraphPart:
    """Capture a view that encodes images or sounds. No adapter is active.

    Args:
        adapted: the model.
        file: the name of the file.
        view: the view.
        changed: the paths of what adapters change, modules or tensors.
        hint: what else can be exported.

    Raises:
        PeftfxError: an adapter acts in the view.
    """
    graph = adapted.graph(view=view)
    refuse_fixed(graph, view.axes)
    for site in graph.sites:
        tensors = {str(name).removeprefix(f"{BASE}.") for name in (site.weight, site.bias) if name}
        if site.path in changed or not tensors.isdisjoint(changed):
            what = "an adapter acts where images or sounds are encoded, and nothing tells the row that one is in"
            raise PeftfxError(what, site.path, f"use adapters of the text's layers alone; or {hint}")
    return GraphPart(file, view, graph, graph)
