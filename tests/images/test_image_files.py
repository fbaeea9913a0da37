"""Image files of any kind are read as transformers' pipelines read them, but for greys of 16 and 32 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from peftfx.errors import PeftfxError
from peftfx.serving.runs.image_prompts import read_image

ORIENTATION = 274  #: EXIF's number for how a camera was held


def pixels(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("held", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_an_image_is_turned_as_its_camera_was_held(kind: str, held: int, tmp_path: Path) -> None:
    image = Image.fromarray(pixels(5, 8, 3))
    exif = image.getexif()
    exif[ORIENTATION] = held
    image.save(tmp_path / "a", kind, exif=exif)
    found = read_image(tmp_path / "a")
    assert found.size == ((8, 5) if held < 5 else (5, 8))
    np.testing.assert_array_equal(found, load_image(str(tmp_path / "a")))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpeg"), ("YCbCr", "tiff")],
)
def test_colours_of_any_kind_become_rgb(mode: str, kind: str, tmp_path: Path) -> None:
    Image.fromarray(pixels(6, 7, 4), "RGBA").convert("RGB").convert(mode).save(tmp_path / "a", kind)
    found = read_image(tmp_path / "a")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(found, load_image(str(tmp_path / "a")))


def test_greys_of_16_bits_are_not_all_white(tmp_path: Path) -> None:
    greys = pixels(6, 7)
    Image.fromarray(greys.astype(np.uint16) * 256 + 200).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.repeat(greys[..., None], 3, 2))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_greys_of_32_bits_are_refused(kind: type, tmp_path: Path) -> None:
    Image.fromarray(pixels(6, 7).astype(kind)).save(tmp_path / "a.tiff")
    with pytest.raises(PeftfxError, match=r"do not say what white is(.|\n)*8 bits"):
        read_image(tmp_path / "a.tiff")
