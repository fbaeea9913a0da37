"""What a command prints on: a stream that is closed, or that lacks letters, does not stop it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import transformers as hf

from peftfx.cli.main import main


def run(command: str, base: Path, stdout: io.TextIOBase | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    name = "\u6a21" if command == "info" else "LlamaForCausalLM"
    hf.LlamaConfig(**sizes, num_attention_heads=2, architectures=[name]).save_pretrained(base)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["peftfx", command, str(base)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0


def test_a_closed_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("inspect", tmp_path / "base", None, monkeypatch)


def test_a_letter_that_the_encoding_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    run("info", tmp_path / "base", io.TextIOWrapper(printed, encoding="ascii", write_through=True), monkeypatch)
    assert rb"\u6a21" in printed.getvalue()
