"""Runs HF PEFT's cases and writes `docs/peft-cases.md`: `python tests/peft_cases_page.py [--again] [WORDS]`.

Each result is kept in `build/peft-cases.json` as it comes, so that a run that was cut off goes on, and one that has
ended only writes the page. `--again` runs cases anew; with words, those alone whose names hold one (`LORA/conv2d`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pages
from pages import Results
from peft_cases.checks import CHECKS, TOLERANCE, Case, cases, run

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "peft-cases.md", ROOT / "build" / "peft-cases.json"
SAID = ("equal", "PEFT is wrong", "refused")  #: what a check may come to
_HEAD = """# HF PEFT's cases

HF PEFT's own tests have a table of {total} configurations of small models (`tests/test_custom_models.py`). This page
has all of them: each was run, in HF PEFT and here, with the same random adapter. The models are ours, and have the same
kinds of modules. What is compared, at sizes other than the example's, to {tolerance} of the
largest value:

| | |
| --- | --- |
| forward | HF PEFT's adapter, saved there and loaded here, against HF PEFT's model |
| merged | the same merged in place here, against HF PEFT's model unmerged |
| PEFT reads ours | an adapter made and saved here, loaded in HF PEFT, against ours |
| saved again | what was loaded here, saved here and loaded in HF PEFT, against the first |
| ONNX Runtime | exported here, against HF PEFT's model |
| gradients | of each tensor of the adapter, in training with dropout, against HF PEFT's |

{summary}

`python tests/peft_cases_page.py` writes this page, `pytest -m peft_cases` runs every case as a test, and a default run
of the tests a few.

"""


def summary(results: Results) -> str:
    """How many cases are what, in one paragraph."""
    words = Counter(_word(results[str(case)]["checks"]) for case in cases() if str(case) in results)
    listed = ", ".join(f"{count} are {word}" for word, count in words.most_common())
    return f"Of {len(cases())} cases, {listed}."


def _word(checks: Mapping[str, str]) -> str:
    """A case in a phrase: what its checks are but for those that are equal."""
    others = [said for said in checks.values() if said != "equal"]
    word = next((said for said in others if said not in SAID), others[0] if others else "equal")
    return {"equal": "equal in every check", "PEFT is wrong": "equal but where HF PEFT is wrong"}.get(word, word)


def page(results: Results) -> str:
    """The page, of all cases that have a result."""
    notes: dict[str, int] = {}
    lines = [f"| method | model | options | {' | '.join(CHECKS)} |", f"| --- | --- | --- |{' --- |' * len(CHECKS)}"]
    for case in cases():
        shown = [pages.shown(results.get(str(case)), check, notes) for check in CHECKS]
        lines.append(f"| {case.method} | {case.model} | `{case.shown}` | {' | '.join(shown)} |")
    listed = pages.listed(notes)
    head = _HEAD.format(total=len(cases()), tolerance=TOLERANCE, summary=summary(results))
    return f"{head}{chr(10).join(lines)}\n\n## Notes\n\n{listed}\n"


def statuses(text: str) -> dict[str, dict[str, str]]:
    """What a page says of each check of each case."""
    return pages.statuses(text, 3, CHECKS)


def _run(words: list[str], again: bool) -> Results:
    """Run the cases that have no result yet, and keep each as it comes."""
    results = pages.kept(RESULTS)
    chosen = (c for c in cases() if not words or any(word in str(c) for word in words))
    pages.keep(RESULTS, results, (c for c in chosen if again or not _ended(c, results)), _alone)
    return results


def _alone(case: Case) -> dict[str, dict[str, str]]:
    with tempfile.TemporaryDirectory() as made:
        return dataclasses.asdict(run(case, Path(made)))


def _ended(case: Case, results: Results) -> bool:
    """Whether a case has a result, and one that may stay."""
    found = results.get(str(case))
    return found is not None and found["checks"].keys() == set(CHECKS) and set(found["checks"].values()) <= set(SAID)


if __name__ == "__main__":
    pages.command(__doc__, "cases", _run, page, PAGE, summary)
