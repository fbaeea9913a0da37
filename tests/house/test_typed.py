"""Public calls are typed: a file that makes each of them passes `mypy --strict`; it names all that is public."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftfx
from peftfx.discovery import method_classes
from peftfx.sites import Sites

CALLS, LOOKS = (Path(__file__).with_name(name) for name in ("typed_calls.py", "typed_looks.py"))
#: Modules that hand names on to users.
FACES = ("export", "graph", "method", "passes", "runtime", "sites", "target", "testing", "vectors")
ROOT = CALLS.parents[2]


def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in (CALLS, LOOKS)]


def test_every_name_of_a_face_is_used_and_so_is_what_sites_can_do() -> None:
    nodes = [node for tree in trees() for node in ast.walk(tree)]
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    names = {name for face in FACES for name in importlib.import_module(f"peftfx.{face}").__all__}
    assert names - used == set()
    methods = {name for name, own in vars(Sites).items() if inspect.isfunction(own) and not name.startswith("_")}
    assert methods - used == set()


def test_every_public_name_is_used() -> None:
    nodes = [node for tree in trees() for node in ast.walk(tree)]
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "peftfx"}
    used |= {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert set(peftfx.__all__) - set(method_classes()) - used == {"PatternMethod"}, "methods are all made alike"


@pytest.mark.slow
def test_the_blocks_of_the_readme_and_the_quickstart_are_typed(tmp_path: Path) -> None:
    """A type checker finds nothing wrong in what users copy."""
    files = []
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        files.append(tmp_path / f"{page.stem}_blocks.py".lower())
        files[-1].write_text("\n".join(blocks), encoding="utf-8")
    for file in files:  # each alone: names are a page's own
        command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache")]
        done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "Success" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
def test_a_strict_reader_finds_nothing_wrong(tmp_path: Path) -> None:
    silent = ["--ignore-missing-imports", "--follow-imports", "silent"]  # the package's own files have their own run
    command = [sys.executable, "-m", "mypy", "--strict", *silent, "--cache-dir", str(tmp_path)]
    done = subprocess.run([*command, str(CALLS), str(LOOKS)], cwd=ROOT, capture_output=True, text=True, check=False)
    own = [line for line in done.stdout.splitlines() if line.startswith("tests/house/typed_")]
    assert own == [], "\n".join(own)
    assert "Success" in done.stdout, done.stdout[-2000:]
