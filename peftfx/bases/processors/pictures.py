"""What a model's own processor makes of a picture, where that is more than pixels: tiles, patches, grids and masks.

The processor is looked for where the model was loaded from. Only its pictures are processed, never texts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.bases.config_fields import first_of, number_of
from peftfx.bases.processors.image_size import Size, image_size_of, processor_file

Picture = Mapping[str, Tensor]
_USUAL = 64  #: the height and width of pictures where nothing tells a size


def picture_inputs(model: nn.Module, accepted: Collection[str], size: Size) -> Picture | None:
    """Return what the model's processor makes of one picture, by the names of the forward's arguments.

    Args:
        model: a model of transformers.
        accepted: the arguments of its forward.
        size: the picture's height and width.

    Returns:
        The tensors, with a first axis for images or for their patches, and NaN where a number depends on the picture's
        pixels; None if there is no processor, it takes no such picture, or it makes plain pixels [1, channels, height,
        width] alone.
    """
    file = processor_file(model)
    made = {} if file is None else _processed(file.parent, file.stat().st_mtime_ns, size)
    texts = _TEXTS if "input_ids" in accepted else ()
    taken = {name: value for name, value in made.items() if name in accepted and name not in texts}
    plain = all(name == "pixel_values" and value.ndim == 4 for name, value in taken.items())
    return None if plain else taken


def axes_of_pictures(model: nn.Module) -> Mapping[str, int]:
    """Return the axis along which the model's processor joins pictures, by argument, from the third axis on.

    MiniCPM-V's patches of all pictures stand side by side in one row.

    Args:
        model: a model of transformers.
    """
    file = processor_file(model)
    return {} if file is None else _joined(file.parent, file.stat().st_mtime_ns, picture_size(model))


def repeated(one: Picture, count: int, floats: Callable[..., Tensor], axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the arguments of several images: random pixels by `floats`, given a shape, and else what all have.

    Args:
        one: the arguments of one image.
        count: how many images there are.
        floats: makes random pixels.
        axes: the axis along which images are joined, by argument, where that is not the first.
    """
    made = {name: torch.cat([value] * count, axes.get(name, 0)) for name, value in one.items()}
    for name, value in made.items():
        if value.is_floating_point():
            pixels = floats(*value.shape)
            made[name] = torch.where(value.isnan(), pixels, value.to(pixels.dtype))
    return made


_chosen: ContextVar[Size | None] = ContextVar("chosen", default=None)


@contextmanager
def pictures_of(size: Size | None) -> Iterator[None]:
    """Choose the size of all examples of pictures inside the context; None leaves the choice as it is."""
    token = _chosen.set(size or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_size() -> Size | None:
    """Return the chosen height and width of pictures, or None."""
    return _chosen.get()


def seeing(config: object) -> object:
    """Return the config of the part of a model that reads images."""
    part = first_of(config, "vision_config", "encoder")
    return config if part is None else seeing(part)


_SIZE_FIELDS = ("image_size", "img_size", "input_size", "crop_size")


def told_size(model: nn.Module) -> Size | None:
    """Return the chosen height and width of pictures, or those that the model's config or processor tells, if any."""
    size: object = chosen_size()
    if size is None:
        size = first_of(seeing(model.config), *_SIZE_FIELDS)
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if size is None:
        size = image_size_of(model)
    if size is None:
        size = first_of(first_of(seeing(model.config), "backbone_config"), *_SIZE_FIELDS)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (height, width) if height and width else None


def picture_size(model: nn.Module) -> Size:
    """Return the height and width of an example's pictures: those that are told, or usual ones.

    A detector may choose as many pieces of a picture as it has queries, at a stride of 8 pixels and at larger ones.
    """
    if told := told_size(model):
        return told
    queries = number_of(getattr(model, "config", None), "num_queries", 1)
    side = _USUAL * math.ceil(math.sqrt(max(1, queries)) * 8 / _USUAL)
    return side, side


def pictures_vary(model: nn.Module, accepted: Collection[str]) -> bool:
    """Return whether the size of a picture decides what the model's processor makes of it, beyond its pixels."""
    found = [picture_inputs(model, accepted, size) for size in ((64, 64), (128, 64), (64, 192))]
    first = found[0]
    return any(not _alike(first, other) for other in found)


def _alike(one: Picture | None, other: Picture | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(
        v.shape == other[n].shape and (v.is_floating_point() or torch.equal(v, other[n])) for n, v in one.items()
    )


_TEXTS = ("input_ids", "attention_mask")


@functools.lru_cache(32)
def _processed(home: Path, changed: int, size: Size) -> Picture:
    processor = _processor(home, changed)
    if processor is None:
        return {}
    with _disable_current_modes(), torch.device("cpu"):
        grey = torch.full((3, *size), 200, dtype=torch.uint8)
        noise = torch.randint(256, grey.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        one, other = (_made(processor, picture) for picture in (grey, noise))
        for name, value in one.items():
            if value.is_floating_point() and (also := other.get(name, value)).shape == value.shape:
                one[name] = value.masked_fill(value != also, torch.nan)
    return one


@functools.lru_cache(32)
def _joined(home: Path, changed: int, size: Size) -> Mapping[str, int]:
    processor, one = _processor(home, changed), _processed(home, changed, size)
    if not one:
        return {}
    with _disable_current_modes(), torch.device("cpu"):
        two = _made(processor, torch.full((3, *size), 200, dtype=torch.uint8), 2)
    pairs = {name: (value.shape, two[name].shape) for name, value in one.items() if name in two}
    grown = {name: [k for k, (a, b) in enumerate(zip(*shapes)) if b == 2 * a] for name, shapes in pairs.items()}
    return {name: axes[0] for name, axes in grown.items() if axes and axes[0] > 1}  # the second is a text's images


def _made(processor: Any, picture: Tensor, count: int = 1) -> dict[str, Tensor]:
    """Return the tensors that a processor makes of a picture, given `count` times, or nothing if it takes none such."""
    for given in (picture, picture.numpy()):  # some processors take no tensors
        try:
            made = processor(images=[given] * count, return_tensors="pt")
        except Exception:  # whatever a processor raises for a picture that it does not take
            continue
        return {name: value for name, value in made.items() if isinstance(value, Tensor) and value.ndim}
    return {}


@functools.lru_cache(8)
def _processor(home: Path, changed: int) -> Any:
    """Load the processor of pictures in a directory; None if it cannot be loaded. It is loaded anew if it changed."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    except Exception:  # a broken file, or a package that is not installed: whoever needs the processor is told
        return None
