"""An export for images of a chosen size, or of any size, where the model has a size of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Literal

from torch import nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import told_size
from peftfx.bases.processors.readers import reads_images, why_not_in_source, why_not_read
from peftfx.errors import PeftfxError
from peftfx.export.deployment.image_parts import picture_decides, reads_numbers
from peftfx.export.deployment.parts import generates, refuse_fixed
from peftfx.export_options.values import ANY_SIZE
from peftfx.model.adapted import AdaptedModel
from peftfx.options import AUTO, DECODE
from peftfx.views.forward_axes import axes_of_forward
from peftfx.views.images.sizes import IMAGES, SIDES, with_free_sizes

_INTERPOLATES = "interpolate_pos_encoding"  #: transformers' name of the argument for images of another size


def example_of_size(
    adapted: AdaptedModel, size: tuple[int, int] | Literal["any"], inputs: Mapping[str, object] | None, view: str
) -> dict[str, object]:
    """Return the arguments of a forward call with images of a size, or, for `any`, of another size than the model's.

    Position embeddings of another size than the model's own are interpolated, if the model can do that.

    Raises:
        PeftfxError: there are `inputs` of a call already, the view is for generation, or the model takes no images.
    """
    where = f"image_size: {size if size == ANY_SIZE else 'x'.join(map(str, size))}"
    if inputs is not None:
        raise PeftfxError("inputs and image_size are both given", where, "leave image_size out: inputs have a size")
    if is_generating(adapted.base, view):
        what = "the size of images can be chosen in the forward view alone"
        raise PeftfxError(what, where, "pass --view forward, or leave image_size out")
    made = example_inputs(adapted.base)
    image = next((made[name] for name in IMAGES if name in made), None)
    if image is None:
        raise PeftfxError("image_size is given, but the model takes no images", where, "leave it out")
    own = (image.shape[-2], image.shape[-1])
    height, width = (own[0], 2 * own[1]) if size == ANY_SIZE else size
    example: dict[str, object] = {**example_inputs(adapted.base, sizes=dict(zip(SIDES, (height, width), strict=True)))}
    if (height, width) != own and _interpolates(adapted.base):
        example[_INTERPOLATES] = True
    return example


def _interpolates(base: nn.Module) -> bool:
    """Return whether a model's forward takes the argument, or hands what else it is given on to a module that does."""
    own = inspect.signature(base.forward).parameters
    if _INTERPOLATES in own or not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return _INTERPOLATES in own
    return any(_INTERPOLATES in inspect.signature(child.forward).parameters for child in base.children())


def is_generating(base: nn.Module, view: str) -> bool:
    """Return whether a model generates text in a view."""
    return view == DECODE or (view == AUTO and generates(base))


def chosen_picture(base: nn.Module, size: tuple[int, int] | Literal["any"] | None, view: str) -> tuple[int, int] | None:
    """Return the size of pictures, if it is chosen and is needed, and the view serves pictures of one size: it
    generates, or its code reads numbers of images. It is needed if it decides what the processor makes, or no file of
    the model tells it.
    """
    if size is None or size == ANY_SIZE or (why_not_read(base) and why_not_in_source(base)):
        return None
    if is_generating(base, view):
        return size if told_size(base) is None or picture_decides(base) else None
    return size if reads_images(base) and reads_numbers(base) and picture_decides(base) else None


def capture_free(adapted: AdaptedModel, example: Mapping[str, object]) -> None:
    """Capture the forward for images of any size, and keep the graph for the export.

    Raises:
        PeftfxError: the model's code cannot be captured so, or fixes a size.
    """
    axes = with_free_sizes(axes_of_forward(adapted.base, example))
    adapted.graphs.base = adapted.source
    graph = adapted.graphs.capture_with(example, axes, adapted.entry())
    refuse_fixed(graph, axes, frozenset(SIDES), "choose one size, as in --image-size 384x384")
