"""Image sizes: whether a capture may leave the heights and widths of images free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from peftfx.bases.config_fields import collect_configs, first_of
from peftfx.graph.graph import TensorSpec
from peftfx.views.dry_run import fake_run
from peftfx.views.view import Axes

IMAGES = ("pixel_values", "pixel_values_videos")
_SIZED = (None,) * 3  #: the axes of an image behind the batch, if none of them is free
SIDES = ("height", "width")  #: the names of the free axes of an image


def free_images(axes: Axes, model: nn.Module, inputs: Mapping[str, object] | None = None) -> Axes:
    """Return the names, with free heights and widths of images if the model takes images of many sizes.

    It does if its config has no image size; and, given the inputs of a call, if it is a convolutional model.
    """
    freed = with_free_sizes(axes)
    if freed is axes or (sized_images(model) and (inputs is None or not is_convolutional(model, inputs))):
        return axes
    return freed


def with_free_sizes(axes: Axes) -> Axes:
    """Return the names, with free heights and widths of images. If no input is of images, they are returned as is."""
    names = [name for name in IMAGES if tuple(axes.get(name, ())[1:]) == _SIZED]
    return {**axes, **{name: (axes[name][0], None, *SIDES) for name in names}} if names else axes


def sized_images(model: nn.Module) -> bool:
    """Return whether a model's config tells the size of its images, or the model has no config."""
    config = getattr(model, "config", None)
    parts: dict[int, object] = {}
    collect_configs(config, parts)
    return not parts or any(
        first_of(part, "image_size", "img_size", "input_size") is not None for part in parts.values()
    )


def is_convolutional(model: nn.Module, inputs: Mapping[str, object]) -> bool:
    """Return whether a model runs on images of another size, and mixes the places of an image by convolutions alone.

    The model is run once on fake tensors, so its size costs nothing. Attention over an image is left out: positions
    are often of one size, and what windows make of a free size can take minutes to capture.

    Args:
        model: a model of transformers.
        inputs: the keyword arguments of a call.
    """
    mixing = _Mixing()
    try:
        with fake_run(model) as fake:
            larger = {name: _larger(inputs[name]) for name in IMAGES if isinstance(inputs.get(name), Tensor)}  # type: ignore[arg-type]
            given = pytree.tree_map_only(Tensor, fake, {**inputs, **larger})
            with mixing, _compiling_state_context():  # under which transformers' code caches no (fake) tensors
                model(**given)
    except Exception:  # whatever the model's code raises for a size that it does not take
        return False
    return not mixing.found


def _larger(images: Tensor) -> Tensor:
    """Return images of twice the height and three times the width: no longer square, with a multiple of each patch."""
    *more, height, width = images.shape
    return torch.zeros(*more, 2 * height, 3 * width, dtype=images.dtype)


class _Mixing(TorchDispatchMode):
    """Watches for an operator that mixes places of an image by products of computed values.

    Attributes:
        found: whether there was one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        name = func._schema.name.removeprefix("aten::")
        self.found |= "attention" in name or name in ("bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def fixed_images(specs: Iterable[TensorSpec]) -> Iterator[str]:
    """Yield a line for each input of images whose height and width are fixed."""
    for spec in specs:
        size = spec.shape[-2:]
        if spec.name.rpartition(".")[2] in IMAGES and len(spec.shape) > 3 and all(isinstance(n, int) for n in size):
            why = "captured at this size; forward views take --image-size"
            yield f"{spec.name} is {size[0]} x {size[1]} ({why})"
