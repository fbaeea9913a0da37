"""Show what a segmentation model finds in an image: pixels for each label, and a picture of class numbers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peftfx.errors import PeftfxError

SEGMENTS = "image-segmentation"
# Any distinct colours; a class always has the same colour.
_COLOURS = np.random.default_rng(0).integers(40, 256, (256, 3))


def counted(found: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Return each segment that the pipeline found, with the number of pixels of its mask; the largest first."""
    told = [
        {"label": one["label"], "score": one["score"], "pixels": int((np.asarray(one["mask"]) > 0).sum())}
        for one in found
    ]
    return sorted(told, key=lambda one: -int(one["pixels"]))


def write_mask(path: Path, found: list[dict[str, Any]], numbers: dict[str, int]) -> None:
    """Write a PNG with a palette, as large as the image. Each pixel is the number of its class.

    Args:
        path: the file to write. It appears only when it is complete.
        found: the segments that transformers' pipeline found.
        numbers: the numbers of the classes, by their labels, from the config.

    Raises:
        PeftfxError: nothing was found, a class number is over 255, or the file cannot be written.
    """
    from PIL import Image

    ids = [numbers.get(one["label"], -1) for one in found]
    if not found or not all(0 <= number < 256 for number in ids):
        what = (
            "the model found no segments to draw"
            if not found
            else "a picture can have only the classes 0 to 255, and one class here is another"
        )
        raise PeftfxError(what, str(path), "leave --output out: the counts are printed")
    mask = np.zeros(np.asarray(found[0]["mask"]).shape, np.uint8)
    for number, one in zip(ids, found, strict=True):
        mask[np.asarray(one["mask"]) > 0] = number
    image = Image.fromarray(mask, mode="P")
    image.putpalette([int(value) for colour in _COLOURS for value in colour])
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".png")
        try:
            with os.fdopen(handle, "wb") as file:
                image.save(file, format="PNG")
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise PeftfxError(
            f"this file cannot be written: {error.strerror or error}", str(path), "choose another"
        ) from error


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
