"""Values of options that are more than a choice: the slots of a graph, and the bound on quantisation's error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from peftfx.errors import PeftfxError
from peftfx.field_types import refuse_misfit_fields
from peftfx.files import is_file
from peftfx.sites.expression import parse

DEFAULT_SLOTS = "all-linear"  #: the sites that get slots by default


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
            return MaxError(match[1] or "error", float(match[2]))  # type: ignore[index]
        except (TypeError, ValueError):
            hint = "pass a bound such as kl=0.05, top1=0.9 or 0.1"
            raise PeftfxError(f"this is not a bound on an error: {given!r}", "max_error", hint) from None


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
