"""Runs the table of methods and writes `docs/methods.md`: `python tests/methods_page.py [--again] [WORDS]`.

Each result is kept in `build/methods.json` as it comes, so that a run that was cut off goes on, and one that has ended
only writes the page. `--again` runs cells anew; with words, those alone whose names hold one (`LORA/BERT`).
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections import Counter
from pathlib import Path

import pages
from method_table.cells import CHECKS, MODELS, Bench, kinds
from method_table.variants import VARIANTS
from pages import Results

from peftfx.contract.method import Method
from peftfx.methods import methods
from peftfx.testing.laws import LAWS

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "methods.md", ROOT / "build" / "methods.json"
SAID = ("equal", "alone", "PEFT is wrong", "refused")
_HEAD = """# Methods

Every method of HF PEFT's that peftfx has, on a LLaMA, a BERT, a T5 and a ViT, tiny and random, with the same random
adapter in HF PEFT and here. Each acts where it acts by default. HF PEFT 0.21 registers 45 types; XLORA and SHADOW are
refused, and the errors say why.

| | |
| --- | --- |
| forward | HF PEFT reads what is saved here: the same at two sizes (1e-5, or twice its own distance from float64) |
| gradients | of each tensor of the file, read back here, against HF PEFT's |
| files both ways | HF PEFT saves what it read: the same tensors by the same names, which are read here again |
| ONNX Runtime | merged, or folded, and exported here: the same outputs (1e-4), at two sizes |
| swappable | put into the slots of one graph of the base, in ONNX Runtime |
| batched | an adapter of each row's own, in ONNX Runtime |

{summary}

`python tests/methods_page.py` writes this page, `pytest -m methods` runs every row as a test, and a default run of the
tests a few. **alone**: HF PEFT cannot do this, and the note says why; what is computed here is held by the other
columns. **refused**: an error says why, and the note has it.

"""


def cells() -> list[str]:
    """All rows, by method and model."""
    return [f"{kind}/{model}" for kind in kinds() for model in MODELS]


def summary(results: Results) -> str:
    """How many cells are what, in one paragraph."""
    counts = Counter(said for name in cells() if name in results for said in results[name]["checks"].values())
    shown = ", ".join(f"{count} are {word}" for word, count in counts.most_common())
    return f"Of {sum(counts.values())} cells of {len(kinds())} methods, {shown}."


def page(results: Results) -> str:
    """The page, of all rows that have a result."""
    notes: dict[str, int] = {}
    lines = [f"| method | model | {' | '.join(CHECKS)} |", f"| --- | --- |{' --- |' * len(CHECKS)}"]
    for name in cells():
        kind, model = name.split("/")
        said = [pages.shown(results.get(name), check, notes) for check in CHECKS]
        lines.append(f"| {kind} | {model} | {' | '.join(said)} |")
    table = _HEAD.format(summary=summary(results)) + "\n".join(lines)
    tables = [table, "## Notes", pages.listed(notes), _laws(), _variants()]
    return "\n\n".join(tables) + "\n"


def laws_of(cls: type[Method]) -> int:
    """Count the laws that say something of a method."""
    return sum(law.is_about(cls) and not law.untested(cls) for law in LAWS)


def _laws() -> str:
    """How many laws say something of each method; `tests/laws` holds each to all of them."""
    about = {kind: laws_of(cls) for kind, cls in sorted(methods().items())}
    rows = "\n".join(f"| {kind} | {count} |" for kind, count in about.items())
    head = (
        "Laws that each method is held to, on random models and options (`tests/laws/test_laws.py`, "
        "[design.md](design.md#laws)):"
    )
    return f"## Laws\n\n{head}\n\n| type | laws that hold |\n| --- | --- |\n{rows}"


def _variants() -> str:
    rows = "\n".join(f"| {v.name} | {v.shown} | {v.said} |" for v in VARIANTS)
    head = "LoRA's variants in HF PEFT, each with the test behind it in `tests/method_table/test_variants.py`:"
    return f"## LoRA's variants\n\n{head}\n\n| variant | option | here |\n| --- | --- | --- |\n{rows}"


def _ended(name: str, results: Results) -> bool:
    found = results.get(name)
    return found is not None and found["checks"].keys() == set(CHECKS) and set(found["checks"].values()) <= set(SAID)


def run(words: list[str], again: bool) -> Results:
    """Run the rows that have no result yet, model by model, and keep each as it comes."""
    results, bench = pages.kept(RESULTS), functools.cache(lambda model: Bench(model, Path(tempfile.mkdtemp())))

    def row(name: str) -> dict[str, dict[str, str]]:
        kind, model = name.split("/")
        try:
            with tempfile.TemporaryDirectory() as made:
                return dataclasses.asdict(bench(model).run(kind, Path(made)))
        except Exception as error:  # of any kind: it is this row's result, and the page's test fails
            told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return {"checks": dict.fromkeys(CHECKS, "fails"), "notes": dict.fromkeys(CHECKS, told)}

    chosen = [name for name in cells() if not words or any(word in name for word in words)]
    by_model = sorted(chosen, key=lambda name: list(MODELS).index(name.split("/")[1]))
    pages.keep(RESULTS, results, [name for name in by_model if again or not _ended(name, results)], row)
    return results


if __name__ == "__main__":
    pages.command(__doc__, "rows", run, page, PAGE, summary)
