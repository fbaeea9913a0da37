"""Long lists of names on few lines: names that differ in one number alone, such as those of layers, are told once."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def in_series(named: Iterable[tuple[str, str]]) -> list[str]:
    """Return a text for each name and what is said of it; one text for names that differ in the number of a layer.

    Args:
        named: pairs of a name and a text.

    Examples:
        >>> in_series([("logits", ""), *((f"present.{n}.key", " [batch, 2]") for n in range(30))])
        ['logits', 'present.N.key [batch, 2] for N = 0 to 29']
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, text in named:
        numbers = _NUMBER.findall(name)
        kind = _NUMBER.sub("N", name) if len(numbers) == 1 else name
        found.setdefault((kind, text), []).append((name, numbers[0] if len(numbers) == 1 else ""))
    return [_told(kind, text, members) for (kind, text), members in found.items()]


def _told(kind: str, text: str, members: list[tuple[str, str]]) -> str:
    if len(members) == 1:
        return members[0][0] + text
    return f"{kind}{text} for N = {_runs([int(number) for _, number in members])}"


def _runs(numbers: list[int]) -> str:
    """Return numbers as `0 to 3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
