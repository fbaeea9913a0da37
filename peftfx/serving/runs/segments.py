"""Segments: what a segmenter says of an image, as counts of pixels by label and as a picture of class numbers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peftfx.errors import PeftfxError

SEGMENTS = "image-segmentation"
_COLOURS = np.random.default_rng(0).integers(40, 256, (256, 3))  # any that are apart; one is always the same class


def counted(found: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Each segment that transformers' pipeline found, with a number of pixels for its mask; most first."""
    told = [
        {"label": one["label"], "score": one["score"], "pixels": int((np.asarray(one["mask"]) > 0).sum())}
        for one in found
    ]
    return sorted(told, key=lambda one: -int(one["pixels"]))


def write_mask(path: Path, found: list[dict[str, Any]], numbers: dict[str, int]) -> None:
    """Write a PNG with a palette, as large as the image: each pixel is the number of its class.

    Args:
        path: where to; it appears when it is complete.
        found: what transformers' pipeline found.
        numbers: of the classes, by their labels, as the config has them.

    Raises:
        PeftfxError: nothing was found, there are more classes than such a picture holds, or it cannot be written.
    """
    from PIL import Image

    ids = [numbers.get(one["label"], -1) for one in found]
    if not found or not all(0 <= number < 256 for number in ids):
        what = (
            "nothing was found to draw"
            if not found
            else "a picture can hold classes from 0 to 255 only, and here is another"
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
        raise PeftfxError(f"cannot be written: {error.strerror or error}", str(path), "choose another file") from error


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
