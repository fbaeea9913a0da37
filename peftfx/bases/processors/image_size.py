"""The size of the images that a processor makes, read from its file and written to it. No code of a processor runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from peftfx.errors import PeftfxError
from peftfx.files import is_file, is_folder, read_json

_FILES = ("preprocessor_config.json", "processor_config.json")
_PART = "image_processor"  #: in `processor_config.json`, the part that is of images
_PIXELS = ("merge_size", "min_pixels", "max_pixels")  #: fields of processors whose sizes count pixels, not edges

Size = tuple[int, int]


def image_size_of(model: object) -> Size | None:
    """Return the height and width of the images that a model's own processor makes, or None if no file says it.

    The files are looked for where the model was loaded from: in its directory, or in the local Hugging Face cache.

    Args:
        model: a model of transformers.
    """
    for path in _files_of(model):
        try:
            size = _size(_image_part(read_json(path)))
        except PeftfxError:  # whoever loads the processor is told that its file is broken
            continue
        if size is not None:
            return size
    return None


def processor_file(model: object) -> Path | None:
    """Return the file of a model's own processor, or None if none is found where the model was loaded from."""
    return next(_files_of(model), None)


def _files_of(model: object) -> Iterator[Path]:
    """Yield the files of a model's own processor that are found where the model was loaded from."""
    home = getattr(getattr(model, "config", None), "name_or_path", None)
    if isinstance(home, str) and home:
        yield from (path for name in _FILES if (path := _found(home, name)) is not None)


def write_image_size(directory: Path, size: Size) -> None:
    """Make the processor in a directory give images of this size. A directory without a processor stays as it is.

    A resize to the shortest edge before a crop keeps its margin: the edge grows by as much as the crop does.

    Args:
        directory: the directory of an export, whose files are copies.
        size: height and width.
    """
    for name in _FILES:
        path = directory / name
        whole = read_json(path) if is_file(path) else {}
        part = _image_part(whole)
        old = _size(part)
        if old is not None:
            part.update(_resized(part, old, size))
            path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _found(home: str, name: str) -> Path | None:
    if is_folder(Path(home)):
        path = Path(home) / name
        return path if is_file(path) else None
    try:
        cached = try_to_load_from_cache(home, name)
    except HFValidationError:  # a directory that is there no more
        return None
    return Path(cached) if isinstance(cached, str) else None


def _image_part(config: dict[str, object]) -> dict[str, object]:
    part = config.get(_PART)
    return part if isinstance(part, dict) else config


def _size(config: Mapping[str, object]) -> Size | None:
    """Return the height and width of what a processor of this config makes: of its crop if it crops, else resized."""
    if any(config.get(name) is not None for name in _PIXELS):
        return None
    crop = _edges(config.get("crop_size")) if config.get("do_center_crop", True) else None
    return crop or (_edges(config.get("size")) if config.get("do_resize", True) else None)


def _edges(value: object) -> Size | None:
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        value = (value.get("height", edge), value.get("width", edge))
    height, width = value if isinstance(value, tuple | list) and len(value) == 2 else (value, value)
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None


def _resized(config: Mapping[str, object], old: Size, new: Size) -> dict[str, object]:
    """Return the fields of a config for images of a new size."""
    sides, size = dict(zip(("height", "width"), new, strict=True)), config.get("size")
    if config.get("do_center_crop", True) and _edges(config.get("crop_size")) is not None:
        before = _edges(size) or old
        grown = [ceil(n * side / was) for n, side, was in zip(before, new, old, strict=True)]
        edges = isinstance(size, int) or (isinstance(size, Mapping) and "shortest_edge" in size)
        kept = {"shortest_edge": max(grown)} if edges else dict(zip(("height", "width"), grown, strict=True))
        return {"crop_size": sides, "size": kept}
    return {"size": sides}
