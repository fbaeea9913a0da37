"""Starting costs little: torch and transformers are imported by what needs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnxruntime", "onnx_ir", "onnx", "onnxscript", "numpy", "peft", "safetensors")
RUN = """
import sys, time
{code}
found = [name for name in {heavy} if name in sys.modules]
print("CPU", time.process_time(), "MODULES", *found)
"""
COMMAND = """
from peftfx.cli.main import app
try:
    app({words})
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import peftfx; peftfx.__version__; peftfx.__all__",
        *(COMMAND.format(words=w) for w in (["--help"], ["--version"], ["export", "--help"], ["inspect", "--help"])),
    ],
    ids=["import peftfx", "--help", "--version", "export --help", "inspect --help"],
)
def test_nothing_large_is_imported(code: str) -> None:
    command = [sys.executable, "-c", RUN.format(code=code, heavy=HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, seconds, _, *modules = done.stdout.split("\n")[-2].split()
    assert modules == []
    assert float(seconds) < 1
