"""The forward of a model of text and images whose code takes images one after the other, as one graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from peftfx.bases.processors.pictures import axes_of_pictures, chosen_size, pictures_vary
from peftfx.bases.processors.readers import encodes_in_forward
from peftfx.errors import PeftfxError
from peftfx.export.deployment.parts import FREE, GraphPart, capture_parts, is_forward, refuse_fixed
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.views.finding.image_views import find_images
from peftfx.views.finding.one_image import forward_with_images
from peftfx.views.view import View


def capture_with_images(adapted: AdaptedModel, view: str, inputs: Mapping[str, object] | None) -> list[GraphPart]:
    """Capture the graphs that a model is served by; see `capture_parts`.

    If the code of a forward reads numbers of images, takes the patches of all images in one axis, or cannot be captured
    for any number of images, the program of one image runs for all images of a call.

    Raises:
        PeftfxError: see `capture_parts`.
    """
    base = adapted.base
    if inputs is not None or not is_forward(base, view, inputs) or not encodes_in_forward(base):
        return capture_parts(adapted, view, inputs)
    failure: PeftfxError | None = None
    if reads_numbers(base) or _joins_patches(base):
        try:
            return [_by_image(adapted)]
        except PeftfxError as error:
            failure = error
            if chosen_size() is not None:  # the own forward has an example of the processor's size
                raise
    try:
        return capture_parts(adapted, view, inputs)
    except PeftfxError as error:
        if failure is None:
            try:
                return [_by_image(adapted)]
            except PeftfxError:
                pass
        elif axes_of_pictures(base):  # side by side, which no other size and no other call mends
            raise failure from error
        raise error


def reads_numbers(base: nn.Module) -> bool:
    """Return whether the code of a model's image encoder reads numbers of an image's arguments."""
    try:
        return find_images(base, of_any_size=True).reads
    except PeftfxError:
        return False


def _joins_patches(base: nn.Module) -> bool:
    """Return whether the patches of all images are in one axis, with a token for so many: the text tells how many."""
    try:
        images = find_images(base, of_any_size=True)
    except PeftfxError:
        return False
    return images.each is None and not images.listed and all(shape[0] != 1 for _, shape in images.inputs)


def picture_decides(base: nn.Module) -> bool:
    """Return whether the size of a picture decides what the processor makes of it, beyond its pixels."""
    accepted = inspect.signature(base.base_model.get_image_features).parameters  # type: ignore[union-attr, arg-type]
    return pictures_vary(base, accepted)


def _by_image(adapted: AdaptedModel) -> GraphPart:
    base = adapted.graphs.base = adapted.source

    def captured(view: View) -> Graph:
        return adapted.graphs.captured(view.inputs(base), None, view)

    shown = forward_with_images(base, captured)
    graph = adapted.graph(view=shown)
    refuse_fixed(graph, shown.axes, FREE | shown.of_images)
    return GraphPart("model.onnx", shown, graph, graph)
