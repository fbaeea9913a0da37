"""Image sizes: whether a capture may leave the heights and widths of images free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
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
#: How many times as high and wide other images are: no longer square, with a multiple of each patch; and square ones.
_LARGER, _DOUBLED, _HALVED = (2, 3), (2, 2), (0.5, 0.5)
_HIGHER, _WIDER = ((2, 1), (0.5, 1)), ((1, 2), (1, 0.5))


def free_images(axes: Axes, model: nn.Module, inputs: Mapping[str, object] | None = None) -> Axes:
    """Return the names, with free heights and widths of images if the model takes images of many sizes.

    It does if its config has no image size and the call has no text. Otherwise it has to be a convolutional model,
    which a run with the call's inputs shows: what attention over an image makes of a free size can take minutes to
    capture, and texts have a fixed number of tokens for an image.
    """
    freed = with_free_sizes(axes)
    fixed = sized_images(model) or (inputs is not None and "input_ids" in inputs)
    if freed is axes or (fixed and (inputs is None or not is_convolutional(model, inputs))):
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
    return _takes(model, inputs, IMAGES, _LARGER, mixing) and not mixing.found


def with_fixed_sizes(axes: Axes, model: nn.Module, inputs: Mapping[str, object]) -> Axes:
    """Return the names, without those of sides of images that the model's code takes in one size alone.

    A free side of such a model is at best fixed by a capture, and what windows or tables of positions make of it can
    take minutes, or more than torch can solve. So the model is run on fake tensors, with larger images and smaller
    ones. An input counts as images if it is of a float type, has four axes or more, and peftfx does not know its name.
    Its sides must be larger than 1. None may be as long as an axis of another input, on which it may depend.

    Args:
        axes: the names of the axes of a call's tensors.
        model: the model.
        inputs: the keyword arguments of the call.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    names = [
        name
        for name, value in tensors.items()
        if value.ndim > 3 and value.is_floating_point()
        if axes[name][-2:] == tuple(f"{name}.{value.ndim - i}" for i in (2, 1))
        if not {1, *(n for other, its in tensors.items() if other != name for n in its.shape)} & {*value.shape[-2:]}
    ]
    if not names or any(_takes(model, inputs, names, sizes) for sizes in (_LARGER, _DOUBLED, _HALVED)):
        return axes
    if not _takes(model, inputs, names, (1, 1)):  # which tells nothing of sizes
        return axes
    higher, wider = (any(_takes(model, inputs, names, sizes) for sizes in alone) for alone in (_HIGHER, _WIDER))
    fixed = {n: (*axes[n][:-2], axes[n][-2] if higher else None, axes[n][-1] if wider else None) for n in names}
    return {**axes, **fixed}


def _takes(
    model: nn.Module,
    inputs: Mapping[str, object],
    names: Iterable[str],
    times: tuple[float, float],
    mixing: _Mixing | None = None,
) -> bool:
    """Return whether a model runs, on fake tensors, on images whose height and width are so many times a call's."""
    try:
        with fake_run(model) as fake:
            images = {name: _sized(value, times) for name in names if isinstance(value := inputs.get(name), Tensor)}
            given = pytree.tree_map_only(Tensor, fake, {**inputs, **images})
            with mixing or nullcontext(), _compiling_state_context():  # transformers' code then caches no fake tensors
                model(**given)
    except Exception:  # whatever the model's code raises for a size that it does not take
        return False
    return True


def _sized(images: Tensor, times: tuple[float, float]) -> Tensor:
    *more, height, width = images.shape
    return torch.zeros(*more, int(times[0] * height), int(times[1] * width), dtype=images.dtype)


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
