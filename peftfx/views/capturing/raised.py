"""The line of a model's code that raised an error in a capture, and what it says."""

from __future__ import annotations

import linecache
import sys
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from peftfx.graph.capturing.sizes.asking_code import quoted

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[2])


def line_of(error: BaseException, model: nn.Module) -> str:
    """Return the innermost line of code that an error came through, its place and text, or nothing.

    If the line is in a file that many models share, the line of the model's own file that leads to it is named too.
    """
    places = _places_of(error)
    if not places:
        return ""
    name, line = places[-1]
    said = raised_at(error) + quoted(linecache.getline(name, line))
    files = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in model.modules()}
    own = next(((file, line) for file, line in reversed(places) if file in files), None)
    return said if own is None or own[0] == name else f"{said}, called from {Path(own[0]).name}:{own[1]}"


def packs(error: BaseException) -> bool:
    """Return whether an error came through code that has rows packed by their lengths."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values())


def said_by(error: BaseException, word: str) -> str:
    """Return what follows a word at the start of the innermost line, such as `raise`, or nothing."""
    places = _places_of(error)
    text = linecache.getline(*places[-1]).strip() if places else ""
    return text.removeprefix(f"{word} ") if text.startswith(f"{word} ") else ""


def raised_at(error: BaseException) -> str:
    """Return the place of the innermost line, such as `file.py:12`, or nothing."""
    return next((f"{Path(name).name}:{line}" for name, line in reversed(_places_of(error))), "")


def _places_of(error: BaseException) -> list[tuple[str, int]]:
    """Return the files and lines that an error came through, from outside in, without torch's and this package's."""
    found, step = [], error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith((_TORCH, _OWN)):
            found.append((file, step.tb_lineno))
        step = step.tb_next
    return found
