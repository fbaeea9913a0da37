"""The view and the graph that an exported file with slots was made of."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from peftfx.export.deployment.image_parts import capture_with_images
from peftfx.graph.graph import Graph
from peftfx.graph.slots import Manifest
from peftfx.model.adapted import AdaptedModel
from peftfx.options import FORWARD
from peftfx.views.forward_axes import ALONG_IMAGES
from peftfx.views.view import View


def served_as(adapted: AdaptedModel, directory: Path, name: str, kind: str) -> tuple[View | None, Graph]:
    """Return the view and the graph of the file `name`, with the active adapters. None is the forward."""
    view = adapted.view(kind)
    if view is None and _takes_any_images(directory, name):
        (part,) = capture_with_images(adapted, FORWARD, None)
        return part.view, part.graph
    return view, adapted.graph() if view is None else adapted.graph(view=view)


def idle_in(adapted: AdaptedModel, directory: Path, manifest: Manifest) -> frozenset[str]:
    """Return the layers of a forward that a graph for any number of images leaves out: no logits need them."""
    names = [name for name, kind in manifest.views.items() if kind == FORWARD and _takes_any_images(directory, name)]
    run = {site.path for name in names for site in served_as(adapted, directory, name, FORWARD)[1].sites.weights}
    return frozenset(site.path for site in adapted.sites.weights if site.path not in run) if names else frozenset()


def _takes_any_images(directory: Path, name: str) -> bool:
    inputs = ir.load(directory / f"{name}.onnx").graph.inputs
    return any(ALONG_IMAGES in map(str, value.shape or ()) for value in inputs)
