"""Runs the matrix and writes `docs/matrix.md`: `python tests/matrix_page.py [--again] [WORDS]`.

Each result is kept in `build/matrix.json` as it comes, so that a run that was cut off goes on, and one that has ended
only writes the page. `--again` runs cells anew; with words, those alone whose names hold one (`GPT-2/LoRA`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import pages
from matrix.cells import METHODS, Bench, Cell, cells

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "matrix.md", ROOT / "build" / "matrix.json"
WORKS = ("equal", "alone", "differs")
_HEAD = """# The matrix

Each cell is a task, a model and a method: transform; gradients reach the adapter and nothing else; ten steps lower the
loss; what is saved `peft` loads, and what `peft` saves comes back, with equal outputs (1e-5 of the largest); merged or
folded and exported as `peftfx export` does, ONNX Runtime computes the same (1e-4 of the largest) at two sizes that
nothing was captured at. Models are tiny and random, their weights off every initial value; methods act where they act
by default. `python tests/matrix_page.py` writes this page, `pytest -m matrix` runs every cell as a test, and a default
run of the tests a few.

{summary}

| | |
| --- | --- |
| **equal** | a cell of HF PEFT's own table; its outputs are HF PEFT's |
| equal | not in that table, and equal to HF PEFT's all the same |
| alone | HF PEFT stops, and the note has its error; all else holds |
| differs | not HF PEFT's outputs everywhere, and the note says where and why |
| refused | an error says why, and the note has it |

"""


def summary(results: Mapping[str, Mapping[str, object]]) -> str:
    """How many cells work, in one paragraph."""
    run = [cell for cell in cells() if str(cell) in results]
    status = {str(cell): str(results[str(cell)]["status"]) for cell in run}
    seed = [str(c) for c in run if c.seed]
    rest = [str(c) for c in run if not c.seed]
    counts = {s: sum(status[c] == s for c in rest) for s in ("equal", "alone", "differs", "refused", "fails")}
    listed = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
    working = sum(status[c] in WORKS for c in seed)
    more = sum(status[c] in WORKS for c in rest)
    return (
        f"{working} of {len(seed)} cells of HF PEFT's table work. Of {len(rest)} others, which that table does not "
        f"have, {more} work ({listed})."
    )


def page(results: Mapping[str, Mapping[str, object]]) -> str:
    """The page, of all cells that have a result."""
    columns = [m for m in METHODS if any(c.method == m for c in cells())]
    notes: dict[str, int] = {}
    lines = [f"| task | model | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells():
        rows.setdefault((cell.task, cell.model), {})[cell.method] = _shown(cell, results.get(str(cell)), notes)
    lines += [f"| {task} | {model} | {' | '.join(row[m] for m in columns)} |" for (task, model), row in rows.items()]
    listed = "\n".join(f"{i}. {note}" for note, i in notes.items())
    return _HEAD.format(summary=summary(results)) + "\n".join(lines) + f"\n\n## Notes\n\n{listed}\n"


def _shown(cell: Cell, result: Mapping[str, object] | None, notes: dict[str, int]) -> str:
    if result is None:
        return "not run"
    note, status = re.sub(r": '[^']*'\.$", ".", str(result["note"])), str(result["status"])  # HF PEFT names the model
    place = f" [{notes.setdefault(note, len(notes) + 1)}](#notes)" if note else ""
    return (f"**{status}**" if cell.seed else status) + place


def statuses(text: str) -> dict[str, str]:
    """What a page says of each cell."""
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    head = next(row for row in rows if row[0] == "task")
    body = [row for row in rows[rows.index(head) + 2 :] if len(row) == len(head)]
    return {
        f"{row[0]}/{row[1]}/{method}": re.sub(r"\*| \[.*", "", value)
        for row in body
        for method, value in zip(head[2:], row[2:], strict=True)
    }


def run(words: list[str], again: bool) -> dict[str, dict[str, object]]:
    """Run the cells that have no result yet, and keep each as it comes."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    chosen = [c for c in cells() if not words or any(word in str(c) for word in words)]
    bench: tuple[tuple[str, str], Bench] | None = None
    for cell in (c for c in chosen if again or results.get(str(c), {}).get("status", "fails") == "fails"):
        start, place = time.perf_counter(), (cell.task, cell.model)
        try:
            if bench is None or bench[0] != place:
                bench = (place, Bench(*place, Path(tempfile.mkdtemp())))
            result = dataclasses.asdict(bench[1].run(cell))
        except Exception as error:
            traceback.print_exc()
            result = {"status": "fails", "note": str(error).strip().partition("\n")[0] or repr(error), "errors": {}}
        results[str(cell)] = result
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{cell}: {result['status']} {result['note']} ({time.perf_counter() - start:.1f} s)", flush=True)
    return results


if __name__ == "__main__":
    pages.command(__doc__, "cells", run, page, PAGE, summary)
