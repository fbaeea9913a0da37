"""The house stands: folders are small, imports run down the layers that `docs/design.md` states, tests are short."""

from __future__ import annotations

from pathlib import Path

import pytest
from house.layers_picture import picture
from house.structure import LAYERS, MOST, ROOT, Structure, describe

DESIGN = ROOT / "docs" / "design.md"


@pytest.fixture(scope="module")
def structure() -> Structure:
    return Structure.of(ROOT)


def test_no_folder_is_crowded(structure: Structure) -> None:
    assert structure.crowded() == {}


def test_imports_run_down_the_layers(structure: Structure) -> None:
    up = [f"{one} imports {other}" for one, other in structure.upward()]
    assert not up, "these imports run up the layers:\n" + "\n".join(up)
    assert structure.unplaced() == []


def test_no_files_import_each_other(structure: Structure) -> None:
    circles = [" <-> ".join(circle) for circle in structure.circles()]
    assert not circles, "these files import each other:\n" + "\n".join(circles)


def test_an_import_that_runs_up_is_seen(tmp_path: Path) -> None:
    for folder in ("peftfx/sites", "peftfx/graph", "passes", "export"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "peftfx/graph/graph.py").write_text("from peftfx.sites.site import Site\n")
    (tmp_path / "peftfx/sites/site.py").write_text("def late():\n    from peftfx.graph.graph import Graph\n")
    found = Structure.of(tmp_path)
    assert found.upward() == [("peftfx.sites.site", "peftfx.graph.graph")]
    assert found.circles() == [["peftfx.graph.graph", "peftfx.sites.site"]]
    assert "peftfx.sites.site imports peftfx.graph.graph" in describe(found)


def test_the_picture_shows_each_layer_and_the_imports_that_run_up_alone_in_another_colour(structure: Structure) -> None:
    drawn = picture(structure)
    assert [name for name in LAYERS if f">{name.removeprefix('peftfx.')}</text>" not in drawn] == []
    assert drawn.count('class="up"') == 2  # `AdaptedModel.export` and its report: to `export` and `export.reports`
    assert drawn.count('class="down"') > 100


def test_the_design_states_the_layers() -> None:
    stated = DESIGN.read_text(encoding="utf-8").partition("## Layers")[2]
    places = [stated.find(f"`{name.removeprefix('peftfx.')}`") for name in LAYERS]
    assert -1 not in places, [name for name, place in zip(LAYERS, places, strict=True) if place < 0]
    assert places == sorted(places)


def test_tests_are_short_and_their_folders_small() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    long = [str(file) for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    folders = {file.parent for file in files}
    assert long == []
    assert [str(folder) for folder in folders if len(list(folder.glob("*.py"))) > MOST] == []
