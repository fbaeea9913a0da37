"""Finds the forward of a model of text and images that runs the program of one image for all images of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import fx, nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.encoded_images import joined_features
from peftfx.bases.processors.fixed_values import FixedValues
from peftfx.bases.processors.pictures import axes_of_pictures
from peftfx.bases.processors.token_types import MODALITIES, TYPES
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.graph.contexts import unchanged
from peftfx.graph.decisions import has_values
from peftfx.graph.graph import Graph
from peftfx.views.finding.image_forward import ForwardWithImages
from peftfx.views.finding.image_positions import find_image_positions
from peftfx.views.finding.image_views import are_apart, find_images
from peftfx.views.images.encoded import Images
from peftfx.views.images.views import ImageEncoder

_DECODE = "export the decode view, which encodes one image at a time"


def forward_with_images(base: nn.Module, captured: Callable[[ImageEncoder], Graph]) -> ForwardWithImages:
    """Return the forward of a model for any number of images of the example's size.

    Args:
        base: the model.
        captured: captures the view of one image.

    Raises:
        PeftfxError: the form of the model's images cannot be found, or the view of one image cannot be captured.
    """
    images = find_images(base, of_any_size=True)
    encoder = None
    with suppress(PeftfxError):
        encoder = captured(ImageEncoder(images))
    if encoder is None or encoder.decisions or _pieces(encoder) is None:
        images = _fixed(base, images)
        encoder = captured(ImageEncoder(images))
    pieces = _pieces(encoder)
    if encoder.decisions or pieces is None:
        what = "the number of an image's pieces, or a branch of the model's code, depends on its pixels"
        raise PeftfxError(what, type(base).__name__, _DECODE)
    if axes_of_pictures(base):
        what = "the images of a call stand side by side in a tensor, and the graph of a forward takes one after another"
        raise PeftfxError(what, type(base).__name__, _DECODE)
    if not _apart(base, images):
        what = "the features of an image depend on the other images of a call, or on their number"
        raise PeftfxError(what, type(base).__name__, _DECODE)
    made = example_inputs(base, sizes={"batch": 1})
    placed = find_image_positions(base, made, images.token, pieces) if images.sections else None
    asked = images.typed or placed is not None or not images.sections
    compares = _features(encoder).target is torch.ops.aten.where.ScalarOther
    types = tuple(name for name in (TYPES, MODALITIES) if name in made and asked)
    return ForwardWithImages(images, pieces, types, placed, compares, encoder)


def _apart(base: nn.Module, images: Images) -> bool:
    """Return whether the model's code gives for two images at once what it gives for each alone."""
    if any(not has_values(p) for p in base.parameters()):
        return True  # this is seen when the graph is compared with the model
    calls = [example_inputs(base, sizes={"batch": 1}, seed=seed) for seed in (1, 2)]
    calls = [{name: call[name] for name in images.names} for call in calls]
    both = {name: torch.cat([call[name] for call in calls]) for name in images.names}
    try:
        with unchanged(base), torch.no_grad():
            made = [base.base_model.get_image_features(**call, return_dict=True) for call in (*calls, both)]  # type: ignore[union-attr, operator]
    except Exception as error:  # whatever the model's code raises for two images
        raise_if_memory_is_out(error)
        return False
    *alone, together = (joined_features(output, images.deeper) for output in made)
    return are_apart(alone, together)


def _features(encoder: Graph) -> fx.Node:
    """Return what a program of one image gives."""
    (output,) = encoder.module.graph.find_nodes(op="output")
    (features,) = output.args[0]
    return features


def _pieces(encoder: Graph) -> int | None:
    """Return how many pieces a program of one image gives, or None if that depends on values."""
    count = _features(encoder).meta["val"].shape[0]
    return count if isinstance(count, int) else None


def _fixed(base: nn.Module, images: Images) -> Images:
    """Return how a model reads images, with all arguments of whole numbers fixed at their values in the example."""
    made = example_inputs(base, sizes={"batch": 1})
    whole = [name for name, _ in images.inputs if not made[name].is_floating_point()]
    inputs = tuple((name, shape) for name, shape in images.inputs if name not in whole)
    fixed = (*images.fixed, *(FixedValues.of(name, made[name]) for name in whole))
    return replace(images, inputs=inputs, fixed=fixed, reads=True)
