"""Rows of the table of methods (`cells.py`) are what `docs/methods.md` says. A default run has a few."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pages
import peft
import pytest
from method_table.cells import CHECKS, MODELS, Bench, kinds
from methods_page import PAGE, SAID, cells, laws_of

from peftfx.methods import methods

QUICK = frozenset({"POLY/BERT", "LN_TUNING/BERT"})
WHOLE = (pytest.mark.methods, pytest.mark.slow)
PAGE_TEXT = PAGE.read_text(encoding="utf-8")
PAGE_SAYS = pages.statuses(PAGE_TEXT, 2, CHECKS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> object:
    return cache(lambda model: Bench(model, tmp_path_factory.mktemp("bench")))


@pytest.mark.parametrize(
    "row", [pytest.param(c, id=c, marks=pytest.mark.methods if c in QUICK else WHOLE) for c in cells()]
)
def test_a_row_is_what_the_page_says(row: str, bench: object, tmp_path: Path) -> None:
    kind, model = row.split("/")
    result = bench(model).run(kind, tmp_path)  # type: ignore[operator]
    assert result.checks == PAGE_SAYS[row], result.notes


def test_the_page_has_every_method_on_every_model_and_nothing_on_it_is_wrong() -> None:
    assert PAGE_SAYS.keys() == set(cells()) >= QUICK
    assert {said for checks in PAGE_SAYS.values() for said in checks.values()} <= set(SAID)
    refused = {kind.value for kind in peft.PeftType} - set(kinds())
    assert refused == {"XLORA", "SHADOW"}
    for kind in kinds():  # on one of the models each is all that peft is
        rows = [PAGE_SAYS[f"{kind}/{model}"] for model in MODELS]
        assert any(row["forward"] == row["files both ways"] == row["ONNX Runtime"] == "equal" for row in rows), kind


def test_the_page_counts_the_laws() -> None:
    for kind, cls in methods().items():
        if cls.__module__.startswith("peftfx.methods."):  # other tests register methods of their own
            assert f"| {kind} | {laws_of(cls)} |" in PAGE_TEXT
