"""The arguments of each image of a call, which the graph of an image takes one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.views.images.encoded import Images


def split_images(images: Images, inputs: Mapping[str, Tensor], *, empty: bool = False) -> list[dict[str, Tensor]]:
    """Return the arguments of each image that its graph takes.

    A row with several images may have them one after the other along its second axis, as tiles, with empty tiles after
    the last image. These are left out unless they are asked for with `empty`. Images may also stand side by side along
    a later axis, if other arguments tell their number.

    Raises:
        PeftfxError: an argument is missing, or has not the shape of whole images.
    """
    parts: dict[str, list[Tensor]] = {}
    told, tiled = _told_count(images, inputs), not empty
    for name, shape in images.inputs:
        value = inputs.get(name)
        if value is None:
            raise PeftfxError("the graph of images needs this argument too", name, "pass what the processor makes")
        if name in images.beside and value.ndim == 2:  # a text of any length
            shape = (shape[0], value.shape[1])
        if (along := _joined_along(value, shape, told)) is not None:
            parts[name], tiled = list(value.split(shape[along], along)), False
            continue
        tiles = value.shape[1] // shape[1] if len(shape) > 1 and value.ndim > 1 and shape[1] else 1
        rest = (shape[1] * tiles, *shape[2:]) if len(shape) > 1 else ()
        if value.ndim != len(shape) or len(value) % shape[0] or tuple(value.shape[1:]) != rest:
            size = f", from images of {images.picture[0]} x {images.picture[1]}" if images.picture else ""
            what = f"the graph takes {list(shape)} for an image{size}, and this call has {list(value.shape)}"
            raise PeftfxError(what, name, "resize the images to the size of the export, or export with another size")
        rows = value.split(shape[0])
        parts[name] = [part for row in rows for part in (row.split(shape[1], 1) if tiles > 1 else (row,))]
    first = next(iter(parts.values()))
    counts = {len(values) for values in parts.values()}
    if len(counts) != 1:
        raise PeftfxError("these arguments hold different numbers of images", ", ".join(parts), "check them")
    several = tiled and len(first) * images.inputs[0][1][0] > len(inputs[images.inputs[0][0]])
    kept = [i for i, value in enumerate(first) if not several or bool((value != 0).any())]
    return [{name: values[i] for name, values in parts.items()} for i in kept]


def _told_count(images: Images, inputs: Mapping[str, Tensor]) -> int:
    """Return how many images the arguments tell whose values the graph knows for one image; 0 if none tells it."""
    known = [(value.shape, inputs.get(value.name)) for value in images.fixed if value.shape]
    return next((len(given) // shape[0] for shape, given in known if isinstance(given, Tensor) and given.ndim), 0)


def _joined_along(value: Tensor, shape: tuple[int, ...], count: int) -> int | None:
    """Return the axis, from the third on, along which images of a shape stand side by side; None if they do not."""
    wanted = [(*shape[:axis], count * shape[axis], *shape[axis + 1 :]) for axis in range(2, len(shape))]
    return wanted.index(tuple(value.shape)) + 2 if count > 1 and tuple(value.shape) in wanted else None
