"""The view and the graph that an exported file with slots was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from peftfx.bases.processors.image_size import Size
from peftfx.export.deployment.image_parts import capture_with_images
from peftfx.export.deployment.image_size import chosen_picture, example_of_size
from peftfx.export.slots.encoders import ENCODED_APART
from peftfx.export_options.values import ANY_SIZE
from peftfx.graph.graph import Graph
from peftfx.graph.slots import Manifest
from peftfx.model.adapted import AdaptedModel
from peftfx.options import DECODE, FORWARD
from peftfx.views.forward_axes import ALONG_IMAGES
from peftfx.views.view import View


def pictured(adapted: AdaptedModel, manifest: Manifest) -> tuple[Size | None, Mapping[str, object] | None]:
    """Return the size of pictures to choose for the views of exported graphs; or the example of a forward call.

    Either is None where the model's own holds.
    """
    size, kinds = manifest.image_size, manifest.views.values()
    if size is None or size == ANY_SIZE:
        return None, None
    view = FORWARD if FORWARD in kinds else DECODE
    picture = chosen_picture(adapted.base, size, view)
    return picture, None if picture is not None else example_of_size(adapted, size, None, view)


def served_as(
    adapted: AdaptedModel, directory: Path, name: str, kind: str, example: Mapping[str, object] | None
) -> tuple[View | None, Graph]:
    """Return the view and the graph of the file `name`, with the active adapters. None is the forward."""
    view = adapted.view(kind)
    if view is None and _takes_any_images(directory, name):
        (part,) = capture_with_images(adapted, FORWARD, None)
        return part.view, part.graph
    return view, adapted.graph(example) if view is None else adapted.graph(view=view)


def idle_in(adapted: AdaptedModel, directory: Path, manifest: Manifest) -> frozenset[str]:
    """Return the layers with sites that no graph runs.

    Graphs that take images or sounds leave out layers of the forward that no logits need. An adapter may also act at
    layers that the example call does not run (`AdaptedModel.idle_layers`).
    """
    kinds = manifest.views
    apart = any(
        kind in ENCODED_APART or (kind == FORWARD and _takes_any_images(directory, n)) for n, kind in kinds.items()
    )
    left = {site.path for site in adapted.sites.weights} if apart else adapted.idle_layers
    if not left:
        return frozenset()
    graphs = [served_as(adapted, directory, name, kind, None)[1] for name, kind in kinds.items()]
    run = {site.path for graph in graphs for site in graph.sites.weights}
    return frozenset(left - run)


def _takes_any_images(directory: Path, name: str) -> bool:
    inputs = ir.load(directory / f"{name}.onnx").graph.inputs
    return any(ALONG_IMAGES in map(str, value.shape or ()) for value in inputs)
