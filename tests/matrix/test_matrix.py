"""Cells of the matrix (`cells.py`) are what `docs/matrix.md` says. A default run has a few."""

from __future__ import annotations

from functools import cache

import pytest
from matrix.cells import METHODS, Bench, Cell, cells
from matrix_page import PAGE, statuses

QUICK = frozenset(
    {
        "sequence-classification/BERT/P-Tuning",
        "image-classification/ViT/Prefix Tuning",
        "image-classification/ViT/IA3",
    }
)
WHOLE = (pytest.mark.matrix, pytest.mark.slow)
SAID = statuses(PAGE.read_text(encoding="utf-8"))
METHODS_SAID = {name.rpartition("/")[2] for name in SAID}
CELLS = [cell for cell in cells() if cell.method in METHODS_SAID]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> object:
    return cache(lambda task, model: Bench(task, model, tmp_path_factory.mktemp("bench")))


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=str(c), marks=pytest.mark.matrix if str(c) in QUICK else WHOLE) for c in CELLS]
)
def test_a_cell_is_what_the_page_says(cell: Cell, bench: object) -> None:
    result = bench(cell.task, cell.model).run(cell)  # type: ignore[operator]
    assert result.status == SAID[str(cell)], result


def test_the_page_has_every_cell_of_its_methods_and_all_of_pefts_table_work() -> None:
    assert SAID.keys() == {str(cell) for cell in CELLS}
    assert METHODS.keys() >= METHODS_SAID
    assert set(SAID.values()) <= {"equal", "alone", "differs", "refused"}
    assert sum(cell.seed for cell in CELLS) == 107
    assert all(SAID[str(cell)] != "refused" for cell in CELLS if cell.seed)
