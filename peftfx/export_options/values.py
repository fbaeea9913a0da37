"""Values of options that are more than a choice: the slots of a graph, and the bound on quantisation's error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from peftfx.errors import PeftfxError
from peftfx.field_types import refuse_misfit_fields
from peftfx.files import is_file
from peftfx.sites.expression import parse

DEFAULT_SLOTS = "all-linear"  #: the sites that get slots by default
ANY_SIZE: Final = "any"  #: stands for images of every height and width
_MOST_PIXELS = 1 << 14  #: a larger height or width is a mistake


@dataclass(frozen=True)
class Slots:
    """The slots that a graph gets.

    Attributes:
        target: picks the linear layers, convs and embeddings that get slots.
        prefix: whether there are slots for soft prompts. With a slot for a prefix before the past, each step copies the
            past, even if the slot is empty.
    """

    target: str = DEFAULT_SLOTS
    prefix: bool = True

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        parse(self.target)

    @staticmethod
    def of(given: Slots | str) -> Slots:
        """Return the slots unchanged, or make slots for a target."""
        return Slots(given) if isinstance(given, str) else given


@dataclass(frozen=True)
class MaxError:
    """A bound on the error of quantisation.

    Attributes:
        kind: `error` is relative to an output's largest magnitude; `kl` is in nats; `top1` is the smallest share that
            has to agree.
        value: the bound.
    """

    kind: str
    value: float

    @staticmethod
    def of(given: float | str | None) -> MaxError | None:
        """Read a bound from a number, or from a text such as `kl=0.05`, `top1=0.9`, `error=0.1` or `0.1`.

        Raises:
            PeftfxError: the bound cannot be read.
        """
        if given is None:
            return None
        match = re.fullmatch(r"\s*(?:(error|kl|top1)\s*=)?\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*", str(given).lower())
        try:
            bound = MaxError(match[1] or "error", float(match[2]))  # type: ignore[index]
        except (TypeError, ValueError):
            hint = "pass a bound such as kl=0.05, top1=0.9 or 0.1"
            raise PeftfxError(f"this is not a bound on an error: {given!r}", "max_error", hint) from None
        if bound.kind == "top1" and bound.value > 1:
            what = f"top1 is a share, and no share is larger than 1: {given!r}"
            raise PeftfxError(what, "max_error", "pass a share such as top1=0.9")
        return bound


def parse_image_size(given: int | tuple[int, int] | str | None) -> tuple[int, int] | Literal["any"] | None:
    """Return the height and width of images: from a number for both, a pair, or a text such as `384x512`; or `any`.

    Raises:
        PeftfxError: the size cannot be read, or is not possible.
    """
    if given is None or given == ANY_SIZE:
        return given  # type: ignore[return-value]
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*[x×,]\s*(\d{1,9}))?\s*", given.lower()) if isinstance(given, str) else None
    if isinstance(given, str):
        pair = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    else:
        pair = given if isinstance(given, tuple) else (given, given)
    if not all(0 < side <= _MOST_PIXELS for side in pair):
        hint = "pass a height and a width, as in 384x512, one number for both, or any"
        raise PeftfxError(f"this is not a size of images: {given!r}", "image_size", hint)
    return pair


def check_text(path: Path) -> None:
    """Refuse a text file that does not exist."""
    if not is_file(path):
        raise PeftfxError("there is no such file", str(path), "give a file of plain text to --calibration")


def refuse_idle_bounds(rounds: bool, *, max_error: object, calibration: str | Path | None) -> None:
    """Refuse bounds and texts for a quantisation that is not asked for, and missing text files."""
    for name, given in (("max_error", max_error), ("calibration", calibration)):
        if not rounds and given is not None:
            raise PeftfxError(f"{name} has no effect, because no weight is quantised", name, "pass quantize too")
    if calibration is not None:
        check_text(Path(calibration))
