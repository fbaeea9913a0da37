"""The line of a model's code that raised an error in a capture, and what it says."""

from __future__ import annotations

import linecache
from pathlib import Path

import torch

from peftfx.graph.capturing.size_conditions import quoted

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[2])


def line_of(error: BaseException) -> str:
    """Return the innermost line of the model's code that an error came through, its place and text, or nothing."""
    name, line = _place_of(error)
    return f"{Path(name).name}:{line}{quoted(linecache.getline(name, line))}" if name else ""


def asserted_by(error: AssertionError) -> str:
    """Return what the innermost line of the model's code asserts, or nothing if that line is no assertion."""
    text = linecache.getline(*_place_of(error)).strip()
    return text.removeprefix("assert ") if text.startswith("assert ") else ""


def _place_of(error: BaseException) -> tuple[str, int]:
    name, line, step = "", 0, error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith((_TORCH, _OWN)):
            name, line = file, step.tb_lineno
        step = step.tb_next
    return name, line
