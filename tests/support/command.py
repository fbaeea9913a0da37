"""The command line as a user types it, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.zoo import TOKENS
from torch import nn

from peftfx.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


def typed(*words: object, **environment: str) -> Result:
    """The command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "peftfx", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def peftfx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command in this process: the same `main`, without the seconds that a start takes."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["peftfx", *map(str, words)])
        with pytest.raises(SystemExit) as raised:
            main()
        captured = capsys.readouterr()
        return Result(int(raised.value.code or 0), captured.out, captured.err)

    return run


def assert_refused(result: Result, *texts: str, code: int = 2) -> None:
    """One message that says all of `texts`, this exit code, and no traceback."""
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.count("peftfx: error: ") == 1
    assert "Traceback" not in result.err
    message = result.err.partition("peftfx: error: ")[2]
    for text in texts:
        assert text in message


@dataclass(frozen=True)
class Inputs:
    """Directories of models and adapters; tests that damage one damage a copy.

    Attributes:
        encoder: BERT without a head, with a tokenizer.
        classifier: BERT with a head of three labels.
        adapter: LoRA and a head of `LABELS` labels, trained on the encoder by `peft`.
        lora: LoRA alone, for the classifier.
        eager: the encoder with the adapter in `peft`.
    """

    encoder: Path
    classifier: Path
    adapter: Path
    lora: Path
    eager: nn.Module


SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


LABELS = 5
