"""The options of an export and their choices; options are checked before anything large is imported or loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from peftfx.errors import PeftfxError, nearest, shown

FORWARD: Final = "forward"
DECODE: Final = "decode"
AUTO: Final = "auto"
VIEWS = (FORWARD, DECODE, AUTO)
FAST: Final = "fast"
TORCH: Final = "torch"
ENGINES = (FAST, TORCH)
CPU: Final = "cpu"
CUDA: Final = "cuda"
NONE: Final = "none"
PROVIDERS = (CPU, CUDA, NONE)  #: the providers whose kernels `Fuse` makes nodes for; `none`: standard operators
DTYPES = ("fp32", "fp16", "bf16")
QUANTIZATIONS = ("int8", "int4", "nf4", "none")
BASE_QUANTIZATIONS = ("nf4",)
CAT: Final = "cat"
LINEAR: Final = "linear"
COMBINATIONS = (CAT, LINEAR)
FIRST_OPSET, LAST_OPSET = 18, 25
_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "view": (VIEWS, "unknown view"),
    "engine": (ENGINES, "unknown engine"),
    "optimize": (PROVIDERS, "unknown optimize target"),
    "quantize_base": (BASE_QUANTIZATIONS, "unknown quantisation of a base:"),
    "combination": (COMBINATIONS, "unknown way to combine:"),
    "dtype": (DTYPES, "unknown dtype"),
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def check_choice(value: str | None, choices: Iterable[str], option: str, what: str) -> None:
    """Refuse a value that is not one of the choices; None stands for the default, and is accepted.

    Raises:
        PeftfxError: `value` is not a choice. The message begins with `what` and names `option`, the choices and the
            nearest one.
    """
    known = tuple(choices)
    if value is not None and value not in known:
        close = nearest(str(value), known, 1)
        hint = f"one of {', '.join(known)}" + (f"; {close}" if close else "")
        raise PeftfxError(f"{what} {shown(value)}", option, hint)


def check_choices(options: object) -> None:
    """Refuse options of an export, given as attributes, if a value is not one of its option's choices."""
    for name, (choices, what) in _CHOICES.items():
        check_choice(getattr(options, name, None), choices, name, what)


def check_view(view: str) -> None:
    """Refuse an unknown view."""
    check_choice(view, *_choice("view"))


def check_opset(opset: int | None) -> None:
    """Refuse an opset that torch's exporter has no operators for, or that onnxscript cannot convert to."""
    if opset is not None and not FIRST_OPSET <= opset <= LAST_OPSET:
        raise PeftfxError(f"cannot write opset {opset}", "opset", f"one of {FIRST_OPSET} to {LAST_OPSET}")


def check_engine(engine: str) -> None:
    """Refuse an unknown engine for the translation to ONNX."""
    check_choice(engine, *_choice("engine"))


def check_optimize(optimize: str) -> None:
    """Refuse an unknown target of the optimisation."""
    check_choice(optimize, *_choice("optimize"))


def check_tolerance(atol: float | None, rtol: float | None) -> None:
    """Refuse tolerances that are negative, infinite or not a number."""
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < float("inf"):
            raise PeftfxError(f"a tolerance must be 0 or more, not {value}", name, "leave it out: it is measured")


def parse_size(text: str, option: str = "max_memory") -> int:
    """Return a number of bytes from a text such as `4GB`, `1.5GiB` or a plain number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if not match:
        raise PeftfxError(f"not a size: {text!r}", option, "as in 4GB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _choice(option: str) -> tuple[tuple[str, ...], str, str]:
    choices, what = _CHOICES[option]
    return choices, option, what
