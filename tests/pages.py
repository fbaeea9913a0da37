"""What the scripts that write tables into `docs` have in common: the command, results kept, notes by numbers, rows."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Results = dict[str, dict[str, dict[str, str]]]
"""Of each case by its name: its checks, and notes on them."""

R = TypeVar("R")


def command(
    doc: str | None,
    noun: str,
    run: Callable[[list[str], bool], R],
    page: Callable[[R], str],
    file: Path,
    summary: Callable[[R], str],
) -> None:
    """Run what the words of the command line ask for, write the page of all results, and print their summary.

    Args:
        doc: the script's.
        noun: what is run, as `cells`.
        run: called with words that names hold one of, and whether what has a result is run again; gives all results.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help=f"run the {noun} whose names hold one of these")
    parser.add_argument("--again", action="store_true", help=f"run {noun} that have a result too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = run(options.words, options.again)
    file.write_text(page(results), encoding="utf-8")
    print(summary(results))


def kept(path: Path) -> Results:
    """The results that a run before has kept."""
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def keep(path: Path, results: Results, cases: Iterable[Any], run: Callable[[Any], dict[str, dict[str, str]]]) -> None:
    """Run these cases, and keep each result as it comes: a run that was cut off goes on."""
    for case in cases:
        start = time.perf_counter()
        results[str(case)] = run(case)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        said = ", ".join(dict.fromkeys(results[str(case)]["checks"].values()))
        print(f"{case}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)


def shown(result: Mapping[str, Mapping[str, str]] | None, check: str, notes: dict[str, int]) -> str:
    """A check in a table, with the number of its note."""
    if result is None:
        return "not run"
    note = result["notes"].get(check, "")
    return result["checks"][check] + (f" [{notes.setdefault(note, len(notes) + 1)}](#notes)" if note else "")


def listed(notes: Mapping[str, int]) -> str:
    """The notes, by number."""
    return "\n".join(f"{number}. {note}" for note, number in notes.items())


def statuses(text: str, names: int, checks: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """What a page says of each check of each row, whose first columns name it."""
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    body = [row for row in rows if len(row) == len(checks) + names and row[0] not in ("method", "---")]
    return {
        "/".join(cell.strip("`") for cell in row[:names]): {
            check: re.sub(r" \[.*", "", said) for check, said in zip(checks, row[names:], strict=True)
        }
        for row in body
    }
