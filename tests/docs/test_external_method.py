"""The package in `examples/row_scale` is found by its entry point, as once installed, and keeps the laws."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.further

PACKAGE = Path(__file__).parents[2] / "examples" / "row_scale"
BROKEN = 'gone = "peftfx_gone:Gone"\nclash = "peftfx.methods.lora:LoRA"\n'


def installed(folder: Path, more: str = "") -> dict[str, str]:
    """An environment in which the package is installed: its sources, and what pip writes of its entry points."""
    config = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / "peftfx_row_scale-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {config['name']}\nVersion: {config['version']}\n")
    points = config["entry-points"]["peftfx.methods"].items()
    lines = "".join(f"{name} = {value}\n" for name, value in points)
    (info / "entry_points.txt").write_text(f"[peftfx.methods]\n{lines}{more.replace(chr(34), '')}")
    paths = [str(folder), str(PACKAGE / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run(code: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def found(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    return tmp_path


def test_it_is_trained_saved_loaded_and_exported_by_its_name(found: Path) -> None:
    out = run([str(PACKAGE / "use.py"), str(found / "out")], installed(found / "site"))
    assert "exported and verified" in out


@pytest.mark.slow
def test_it_keeps_the_laws_and_the_command_line_knows_it(found: Path) -> None:
    code = (
        "import sys, peftfx.testing; from peftfx_row_scale import RowScale;"
        "print(peftfx.testing.check(RowScale)); sys.argv = ['peftfx', 'methods', 'row_scale'];"
        "from peftfx.cli.main import main; main()"
    )
    out = run(["-c", code], installed(found / "site"))
    assert "RowScale: all" in out
    assert "skipped parity" in out
    assert "A learned factor for each output row" in out


def test_a_package_that_cannot_be_loaded_is_told_and_stops_no_other(found: Path) -> None:
    code = "from peftfx.methods import methods; print(sorted(methods()))"
    out = run(["-c", code], installed(found / "site", BROKEN))
    assert "'LORA'" in out
    assert "'ROW_SCALE'" in out
    assert "the method gone of the package peftfx-row-scale is left out" in out
