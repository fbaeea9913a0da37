"""Checks every model type of transformers and writes `docs/models.md`: `python tests/models_page.py [--again] [WORDS]`.

Each result is kept in `tests/every_model/results.csv` as it comes, so that a run that was cut off goes on, and one that
has ended only writes the page. `--again` runs checks anew, and `--status` those alone that ended so; with words, those
whose names hold one: `text-generation/decode/llama`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from every_model.checks import DIFFUSERS, Result
from every_model.diffusion_models import has_diffusers
from every_model.sweep import Key, keys, read, run

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_HEAD = """# Models

Every model type that transformers lists for a task, built tiny from its config with random weights, with a random LoRA
of `peft` on all that is linear: exported, and ONNX Runtime held against `peft`'s own model to 1e-4 of the largest
output, at two sizes that nothing was captured at. Where torch's own float32 is further than half of that from float64,
the bound is twice its distance. A graph that takes the positions of images' tokens gets those that the model's class
makes. The decode view is held against `peft`'s `generate`, logits step by step: of two prompts, one padded on the left,
and of one alone; with images or sounds, of prompts with one each. Of diffusers there are the denoisers that pipelines
for images have. `python tests/models_page.py` writes this page, `pytest -m zoo` runs every check as a test.

**equal** it is. **refused**: an error says why, and nothing is written. **differs**, **crashed**: a fault. Not built:
the tiny model does not run by itself, or `peft` does not adapt it; it counts nowhere. What is exported with text alone,
though its class reads sounds or images beside it, counts as refused, but for text generation: a warning says so.

"""
_ORDER = ("equal", "refused", "differs", "crashed", "not built", "not run")


def page(results: Mapping[Key, Result]) -> str:
    """The page, of whatever results there are."""
    groups: dict[tuple[str, str], dict[str, Result]] = defaultdict(dict)
    for task, view, model in keys():
        groups[task, view][model] = results.get((task, view, model), Result("not run"))
    lines = ["| task | view | built | equal | refused | differs | crashed | not built | not run |"]
    lines.append("| --- | --- " + "| --- " * 7 + "|")
    for (task, view), found in groups.items():
        counts = Counter(result.status for result in found.values())
        built = sum(counts[status] for status in _ORDER[:4])
        lines.append(f"| {task} | {view} | {built} | " + " | ".join(str(counts[s]) for s in _ORDER) + " |")
    for (task, view), found in groups.items():
        lines += ["", f"## {task}, {view}"]
        for status in ("equal", "not run"):
            names = [f"`{model}`" for model, result in found.items() if result.status == status]
            if names:
                lines += ["", f"{status.capitalize()}: {', '.join(names)}."]
        rest = [(m, r) for status in _ORDER[1:-1] for m, r in found.items() if r.status == status]
        if rest:
            lines += ["", "| model | | why |", "| --- | --- | --- |"]
            lines += [f"| `{model}` | {result.status} | {_told(result)} |" for model, result in rest]
    return _HEAD + "\n".join(lines) + "\n"


def _told(result: Result) -> str:
    """Return why, for a table. What others' code says of a model that is not built is a quotation."""
    quoted = " ".join(result.note.replace("`", "'").replace("|", "\\|").split())
    return f"`{quoted}`" if result.status == "not built" else _sentence(result.note)


def _sentence(note: str) -> str:
    words = re.sub(r"\s+", " ", note).replace("|", "\\|").strip().split("`")
    words[::2] = [part.replace("<", "\\<").replace("[", "\\[") for part in words[::2]]  # code stays as it is
    return "`".join(words)


def chosen(words: list[str], status: str, again: bool) -> list[Key]:
    """The checks to run: those that have no result, or are asked for."""
    results = read()
    found = [key for key in keys() if not words or any(word in "/".join(key) for word in words)]
    found = [key for key in found if key[0] != DIFFUSERS or has_diffusers()]
    if status:
        return [key for key in found if key in results and results[key].status == status]
    return [key for key in found if again or key not in results]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the checks whose names hold one of these")
    parser.add_argument("--again", action="store_true", help="run checks that have a result too")
    parser.add_argument("--status", default="", help="run those again that ended so")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    for key, result in run(chosen(options.words, options.status, options.again)):
        print(f"{'/'.join(key)}: {result.status} {result.note}", flush=True)
        if time.monotonic() - start > 60 * options.minutes:
            break
    PAGE.write_text(page(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
