"""Words of a command line that are more than a choice, checked before anything large is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peftfx.errors import PeftfxError


def check_target(target: str) -> None:
    """Refuse a target that cannot be read; what it picks is known later."""
    from peftfx.sites.expression import parse

    parse(target)


def check_slots(slots: str | None, *, swappable: bool, prefix: bool) -> str | None:
    """The target of `--slots`, by default all linear layers; None without `--swappable`.

    Raises:
        PeftfxError: it cannot be read, or is given without `--swappable`, where it would do nothing.
    """
    if not swappable:
        lost = "--slots" if slots is not None else "" if prefix else "--no-prefix"
        if lost:
            raise PeftfxError(f"{lost} says what a graph with --swappable has", lost, "pass --swappable too")
        return None
    target = "all-linear" if slots is None else slots
    check_target(target)
    return target


def named_directories(texts: Iterable[str]) -> dict[str, Path]:
    """Names and directories: each `NAME=DIR`.

    Raises:
        PeftfxError: a text is none, or names what another names, too.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise PeftfxError("not an adapter with a name", text, "as in --batched french=adapters/french")
        if name in found:
            raise PeftfxError(f"two adapters are named {name!r}", text, f"the other is {found[name]}")
        found[name] = Path(folder)
    return found
