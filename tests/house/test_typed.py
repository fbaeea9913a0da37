"""Public calls are typed: a file that makes each of them passes `mypy --strict`; it names all that is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peftfx
from peftfx.discovery import method_classes

CALLS = Path(__file__).with_name("typed_calls.py")
ROOT = CALLS.parents[2]


def test_every_public_name_is_used() -> None:
    tree = ast.parse(CALLS.read_text(encoding="utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "peftfx"}
    used |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert set(peftfx.__all__) - set(method_classes()) - used == {"PatternMethod"}, "methods are all made alike"


@pytest.mark.slow
def test_a_strict_reader_finds_nothing_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--cache-dir", str(tmp_path)]
    done = subprocess.run([*command, str(CALLS)], cwd=ROOT, capture_output=True, text=True, check=False)
    own = [line for line in done.stdout.splitlines() if line.startswith("tests/house/typed_calls.py")]
    assert own == [], "\n".join(own)
    assert "Success" in done.stdout, done.stdout[-2000:]
