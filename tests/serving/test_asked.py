"""What `peftfx run` is asked for is checked ahead of all work: what is wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftfx import PeftfxError
from peftfx.serving.runs.asked import Asked


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        ({"top": 0}, "--top is 0", "1 or more"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0", "1 or more"),
        ({"temperature": -0.5}, "--temperature is -0.5", "0 or more"),
        ({"temperature": float("nan")}, "--temperature is nan", "0 or more"),
        ({"save": Path("rows.txt")}, "--save writes a .npy file", "rows.npy"),
        ({"output": Path("segments.jpg")}, "--output writes a .png file", "segments.png"),
        ({"output": Path("nowhere/segments.png")}, "folder that does not exist", "make the folder first"),
        ({"texts": ()}, "exactly one of", "--prompt"),
        ({"images": (Path("none.png"),), "texts": ()}, "no such image", "check the path"),
        ({"sounds": (Path("none.wav"),), "texts": ()}, "no such recording", "check the path"),
    ],
    ids=str,
)
def test_a_mistake_is_told_with_what_to_do(given: dict[str, object], what: str, hint: str) -> None:
    with pytest.raises(PeftfxError, match=what) as caught:
        Asked(**{"directory": Path("out"), "texts": ("a",), **given}).check()  # type: ignore[arg-type]
    assert caught.value.where
    assert hint in (caught.value.hint or "")


def test_endings_may_be_of_any_case(tmp_path: Path) -> None:
    Asked(Path("out"), texts=("a",), save=tmp_path / "ROWS.NPY", output=tmp_path / "a.Png").check()
