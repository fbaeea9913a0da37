"""What is wrong with a command line is told before anything large is imported, with what there is to choose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Result, assert_refused

from peftfx.export_options.quantize import BITS, DEFAULT_BLOCKS
from peftfx.options import QUANTIZATIONS

HEAVY = ("torch", "transformers", "onnxruntime", "onnx_ir", "numpy")
EXPORT = ("export", "--base", "nowhere", "--output", "out")
LINES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*EXPORT, "--view", "decoder"), ("'decoder'", "one of forward, decode, auto", "did you mean 'decode'")),
    ((*EXPORT, "--dtype", "float8"), ("unknown dtype 'float8'",)),
    ((*EXPORT, "--engine", "fastest"), ("'fastest'", "one of fast, torch")),
    ((*EXPORT, "--optimize", "gpu"), ("'gpu'", "one of cpu, cuda, none")),
    ((*EXPORT, "--quantize", "int2"), ("'int2'", "one of int8, int4")),
    ((*EXPORT, "--opset", "3"), ("opset 3", "18 to 25")),
    ((*EXPORT, "--max-memory", "much"), ("not a size", "4GB")),
    ((*EXPORT, "--swappable", "--slots", "mlp |"), ("cannot read the target", "mlp |")),
    ((*EXPORT, "--swappable", "--slots", "/(/"), ("bad regular expression",)),
    ((*EXPORT, "--slots", "mlp"), ("--slots", "--swappable")),
    ((*EXPORT, "--no-prefix"), ("--no-prefix", "--swappable")),
    ((*EXPORT, "--batched", "french"), ("not of the form NAME=DIR", "french=adapters/french")),
    (
        (*EXPORT, "--batched", "a=x", "--batched", "a=y"),
        ("two adapters are named 'a'", "the other adapter of this name is x"),
    ),
    (
        ("export-adapter", "--adapter", "a", "--for", "g", "--output", "o", "--combination", "sum"),
        ("'sum'", "one of cat, linear"),
    ),
    (("inspect", "nowhere", "--target", "mlp &"), ("cannot read the target",)),
]


@pytest.mark.parametrize(("words", "texts"), LINES, ids=lambda value: " ".join(value[-2:]))
def test_it_is_one_message(words: tuple[str, ...], texts: tuple[str, ...], peftfx: Callable[..., Result]) -> None:
    assert_refused(peftfx(*words), *texts)
    assert not Path("out").exists()


def test_nothing_large_is_imported_by_then() -> None:
    code = f"""
import sys, time
from peftfx.cli.main import main
for words in {[words for words, _ in LINES]!r}:
    sys.argv = ["peftfx", *words]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, words
    assert not [name for name in {HEAVY} if name in sys.modules], words
assert time.process_time() < 1, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("peftfx: error: ") == len(LINES)


def test_the_choices_are_those_that_are_implemented() -> None:
    assert (*BITS, *DEFAULT_BLOCKS, "none") == QUANTIZATIONS
