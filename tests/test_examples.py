"""The examples run as a reader runs them, each in a process of its own; what they claim, they assert themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, str(example), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}, "an example writes to its output directory alone"
