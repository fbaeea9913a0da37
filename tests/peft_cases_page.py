"""Runs HF PEFT's cases and writes `docs/peft-cases.md`: `python tests/peft_cases_page.py [--again] [WORDS]`.

Each result is kept in `build/peft-cases.json` as it comes, so that a run that was cut off goes on, and one that has
ended only writes the page. `--again` runs cases anew; with words, those alone whose names hold one (`LORA/conv2d`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft_cases.checks import CHECKS, ELSEWHERE, TOLERANCE, Case, cases, run

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "peft-cases.md", ROOT / "build" / "peft-cases.json"
SAID = ("equal", "PEFT is wrong", "refused")  #: what a check may come to
Results = Mapping[str, Mapping[str, Mapping[str, str]]]
_HEAD = """# HF PEFT's cases

HF PEFT's own tests have a table of {total} configurations of small models (`tests/test_custom_models.py`). This page
has all of them: each whose method is here was run, in HF PEFT and here, with the same random adapter. The models are
ours, and have the same kinds of modules. What is compared, at sizes other than the example's, to {tolerance} of the
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
    here, elsewhere = len(cases()), sum(ELSEWHERE.values())
    return (
        f"Of {here + elsewhere} cases, {here} are run on this page: {listed}. "
        f"{elsewhere} are of {len(ELSEWHERE)} methods whose rows are not on this page: "
        "those that peftfx has are compared with HF PEFT in `tests/methods` and `tests/newer`."
    )


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
        shown = [_shown(results.get(str(case)), check, notes) for check in CHECKS]
        lines.append(f"| {case.method} | {case.model} | `{case.shown}` | {' | '.join(shown)} |")
    listed = "\n".join(f"{number}. {note}" for note, number in notes.items())
    head = _HEAD.format(total=len(cases()) + sum(ELSEWHERE.values()), tolerance=TOLERANCE, summary=summary(results))
    rest = "\n".join(f"| {method} | {count} |" for method, count in ELSEWHERE.items())
    return (
        f"{head}{chr(10).join(lines)}\n\n## Notes\n\n{listed}\n\n## Methods whose rows are not run here\n\n"
        f"| method | cases |\n| --- | --- |\n{rest}\n"
    )


def _shown(result: Mapping[str, Mapping[str, str]] | None, check: str, notes: dict[str, int]) -> str:
    if result is None:
        return "not run"
    note = result["notes"].get(check, "")
    return result["checks"][check] + (f" [{notes.setdefault(note, len(notes) + 1)}](#notes)" if note else "")


def statuses(text: str) -> dict[str, dict[str, str]]:
    """What a page says of each check of each case."""
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    body = [row for row in rows if len(row) == len(CHECKS) + 3 and row[0] not in ("method", "---")]
    return {
        f"{row[0]}/{row[1]}/{row[2].strip('`')}": {
            check: re.sub(r" \[.*", "", said) for check, said in zip(CHECKS, row[3:], strict=True)
        }
        for row in body
    }


def _run(words: list[str], again: bool) -> Results:
    """Run the cases that have no result yet, and keep each as it comes."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for case in (c for c in cases() if not words or any(word in str(c) for word in words)):
        if again or not _ended(case, results):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as made:
                result = run(case, Path(made))
            results[str(case)] = dataclasses.asdict(result)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{case}: {_word(result.checks)} ({time.perf_counter() - start:.1f} s)", flush=True)
    return results


def _ended(case: Case, results: Results) -> bool:
    """Whether a case has a result, and one that may stay."""
    found = results.get(str(case))
    return found is not None and found["checks"].keys() == set(CHECKS) and set(found["checks"].values()) <= set(SAID)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the cases whose names hold one of these")
    parser.add_argument("--again", action="store_true", help="run cases that have a result too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _run(options.words, options.again)
    PAGE.write_text(page(results), encoding="utf-8")
    print(summary(results))


if __name__ == "__main__":
    main()
