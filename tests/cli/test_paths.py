"""Paths that no file can have, and files that this user may not read."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command import Inputs, Result, assert_refused

from peftfx.adapters.single_files.keys import read_single_file
from peftfx.bases.files.folder import weight_files
from peftfx.errors import PeftfxError
from peftfx.rules.peft_files import Weights


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_name_too_long_is_told(command: str, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    words = ("--base", inputs.classifier, "--adapter", inputs.lora, *(("--rank", 2) if command == "convert" else ()))
    done = peftfx(command, *words, "--output", tmp_path / ("a" * 300))
    assert_refused(done, "cannot write: File name too long", "hint: choose a shorter name")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """In this context, the root user has no more rights than others."""
    if os.name == "nt":
        pytest.skip("Windows has no such rights")
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    "read",
    [Weights, weight_files, lambda folder: read_single_file(folder / "model.safetensors")],
    ids=["adapter", "base", "one file"],
)
def test_a_file_that_may_not_be_read_is_told(read: Callable[[Path], object], inputs: Inputs) -> None:
    """safetensors says that there is no such file; it was called damaged."""
    with tempfile.TemporaryDirectory() as name:  # the folders above pytest's own are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(inputs.lora / "adapter_model.safetensors", folder)
        shutil.copy(inputs.classifier / "model.safetensors", folder)
        for path in folder.iterdir():
            path.chmod(0)
        with as_nobody(), pytest.raises(PeftfxError, match="cannot be read: Permission denied") as raised:
            read(folder)
        assert "may read" in raised.value.hint
