"""The line of a model's code that asks torch about a size or a value during a capture."""

from __future__ import annotations

import linecache
from pathlib import Path
from types import FrameType

import torch

_TORCH = str(Path(torch.__file__).parent)
_CAPTURING = str(Path(__file__).parents[1])  #: functions that stand in for torch's during a capture
_WIDE = 100  #: the longest quotation of a line
_NN = str(Path(torch.nn.__file__).parent)
#: Files in which torch asks on behalf of a caller, whose frame is further out.
_BEARERS = tuple(
    str(Path(_TORCH, *parts))
    for parts in (
        ("__init__.py",),
        ("fx", "experimental", "sym_node.py"),
        ("fx", "experimental", "symbolic_shapes.py"),
        ("fx", "experimental", "recording.py"),
    )
)


def model_asks(frame: FrameType | None) -> bool:
    """Return whether the model's Python code asked. Torch's operators ask to pick a kernel."""
    while frame is not None and (frame.f_code.co_filename in _BEARERS or _in_capture(frame)):
        frame = frame.f_back
    first = "" if frame is None else frame.f_code.co_filename
    return not first.startswith(_TORCH) or first.startswith(_NN)


def asked_at(frame: FrameType | None) -> str:
    """Return the line of the model's Python code that asked, or for which torch's operators asked."""
    frame = _behind(frame, _TORCH, _CAPTURING)
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _in_capture(frame: FrameType) -> bool:
    """Return whether this is code that stands for a function of torch during a capture, and asks for its caller."""
    return frame.f_code.co_filename.startswith(_CAPTURING)


def line_asked(frame: FrameType | None) -> str:
    """Return the text of the line that `asked_at` names, as `quoted` gives it."""
    frame = _behind(frame, _TORCH, _CAPTURING)
    return "" if frame is None else quoted(linecache.getline(frame.f_code.co_filename, frame.f_lineno))


def _behind(frame: FrameType | None, *folders: str) -> FrameType | None:
    """Return the innermost frame whose code is in none of these folders."""
    while frame is not None and frame.f_code.co_filename.startswith(folders):
        frame = frame.f_back
    return frame


def is_asserted(frame: FrameType | None) -> bool:
    """Return whether the model's code asks in an `assert`, which is true for all valid values."""
    return line_of_code(frame, 0).strip().startswith("assert ")


def only_raises(frame: FrameType | None) -> bool:
    """Return whether the model's code asks only to raise an error, which it does for no valid values."""
    # where code asks for `not`, the answer that raises nothing is the other
    turned = "not " in line_of_code(frame, 0).replace(" is not ", " ")
    return raises_next(frame) and not turned and model_asks(frame)


def raises_next(frame: FrameType | None) -> bool:
    """Return whether the model's code asks in an `if` whose first line raises an error."""
    asks, then = line_of_code(frame, 0).strip(), line_of_code(frame, 1).strip()
    return asks.startswith("if ") and asks.endswith(":") and then.startswith("raise ")


def line_of_code(frame: FrameType | None, after: int) -> str:
    """Return the line of the model's code that asks, or one after it."""
    frame = _behind(frame, _TORCH, _CAPTURING)
    return "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno + after)


def quoted(line: str) -> str:
    """Return a line of code in brackets, for the end of a sentence that names its place, or nothing for no line."""
    text = line.strip().replace("`", "'")
    return f" (`{text if len(text) <= _WIDE else text[: _WIDE - 4] + ' ...'}`)" if text else ""
