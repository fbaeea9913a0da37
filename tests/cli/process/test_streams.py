"""What a command prints on: one that is closed or lacks letters does not stop it, and one that is full is told."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import transformers as hf

from peftfx.cli.main import main


def run(command: str, base: Path, stdout: io.TextIOBase | None, monkeypatch: pytest.MonkeyPatch) -> object:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    name = "\u6a21" if command == "info" else "LlamaForCausalLM"
    hf.LlamaConfig(**sizes, num_attention_heads=2, architectures=[name]).save_pretrained(base)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["peftfx", command, str(base)])
    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code


def test_a_closed_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("inspect", tmp_path / "base", None, monkeypatch) == 0


def test_a_letter_that_the_encoding_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    stdout = io.TextIOWrapper(printed, encoding="ascii", write_through=True)
    assert run("info", tmp_path / "base", stdout, monkeypatch) == 0
    assert rb"\u6a21" in printed.getvalue()


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_stream_that_is_full(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told where the text is written, and where it is kept until the end."""
    stdout = io.TextIOWrapper(io.BufferedWriter(Full(), 2**16), write_through=at_once)
    assert run("info", tmp_path / "base", stdout, monkeypatch) == 2
    what = "peftfx: error: cannot be written: No space left on device [stdout]"
    assert capsys.readouterr().err == f"{what}\n  hint: free some space, or write it to another disk\n"
