"""Every model type is what docs/models.md says of it: by default one, and all with `pytest -m zoo`."""

from __future__ import annotations

from pathlib import Path

import pytest
from every_model.checks import Result, check
from every_model.sweep import Key, keys, read
from models_page import PAGE, page

KNOWN = read()
SHORT: Key = ("text-generation", "forward", "gptj")


def _cases() -> list[object]:
    marks = (pytest.mark.slow, pytest.mark.zoo)
    return [SHORT, *(pytest.param(key, id="-".join(key), marks=marks) for key in keys() if key in KNOWN)]


@pytest.mark.parametrize("key", _cases(), ids="-".join)
def test_a_model_is_what_the_page_says(key: Key) -> None:
    task, view, model_type = key
    found = check(task, model_type, view)
    assert found.status == KNOWN[key].status, found.note


@pytest.mark.skipif(set(KNOWN) != {*keys()}, reason="the results are of another version of transformers")
def test_the_page_is_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(KNOWN)


def test_a_partial_sweep_says_what_was_not_run() -> None:
    known = {
        SHORT: Result("equal"),
        ("text-generation", "decode", "gpt2"): Result("refused", "why | not: `a[0] < b` [X]"),
    }
    text = page(known)
    count = sum(task == "text-generation" for task, view, _ in keys() if view == "forward")
    assert f"| text-generation | forward | 1 | 1 | 0 | 0 | 0 | 0 | {count - 1} |" in text
    assert "| `gpt2` | refused | why \\| not: `a[0] < b` \\[X] |" in text
    assert Path(PAGE).name == "models.md"
