"""The notebooks run, cell by cell, as a reader runs them; they are kept without outputs."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole_and_without_outputs(notebook: Path) -> None:
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["metadata"]["language_info"]["name"]) == (4, "python")
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, cell in enumerate(cells(notebook)):
        if cell["cell_type"] != "code":
            continue
        *body, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body, []), f"{notebook.name}, cell {number}", "exec"), vars(module))
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), f"{notebook.name}, cell {number}", "exec"), vars(module))
            continue
        shown = eval(compile(ast.Expression(last.value), f"{notebook.name}, cell {number}", "eval"), vars(module))
        if html := getattr(shown, "_repr_html_", None):
            assert html().startswith("<iframe"), "what a notebook shows"
