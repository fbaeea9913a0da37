"""Progress: stages, bytes, rate and time left."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import peftfx
from peftfx.cli.progress import Progress, share_line, written_line
from peftfx.cli.voice import VOICE
from peftfx.errors import PeftfxError
from peftfx.options import parse_size
from peftfx.telling import LOG, listening, tell_share


def test_a_line_says_bytes_rate_and_time_left() -> None:
    assert written_line(2_500_000_000, 10_000_000_000, 5.0) == "2.50 of 10.00 GB, 500 MB/s, 15 s left"


def test_without_a_terminal_there_is_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 1.0, 5.5, 6.0, 30.0])
    monkeypatch.setattr("peftfx.cli.progress.time.perf_counter", lambda: next(now))
    with Progress() as progress:
        progress.stage("write")
        for done in range(1, 4):
            progress.written(done * 10**9, 4 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\[.*?\] *", "", line) for line in lines] == ["write", "2.00 of 4.00 GB, 364 MB/s, 6 s left"]


class Terminal(io.StringIO):
    """What stands for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the logger `peftfx` has."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    yield found
    LOG.removeHandler(handler)
    LOG.setLevel(logging.NOTSET)


def test_a_line_says_how_far_a_stage_is_and_the_time_left() -> None:
    assert share_line("3 of 12 layers", 0.25, 6.0) == "3 of 12 layers, 18 s left"
    assert share_line("3 of 12 layers", 0.25, 0.3) == "3 of 12 layers"


def test_how_far_a_stage_is_shows_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for asked in ("terminal", "as_json", "quiet", "piped"):
        stream = io.StringIO() if asked == "piped" else Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            if hasattr(VOICE, asked):
                patch.setattr(VOICE, asked, True)
            with Progress() as progress:
                progress.stage("capture")
                tell_share("3 of 12 layers", 0.25)
        said[asked] = stream.getvalue()
    assert "3 of 12 layers" in said["terminal"]
    assert re.fullmatch(r"\[ *0.0 s\] capture\n", said["piped"])
    assert said["as_json"] == said["piped"]
    assert said["quiet"] == ""


def test_captures_and_verifications_tell_how_far_they_are(logged: list[logging.LogRecord], tmp_path: Path) -> None:
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = BertModel(BertConfig(**size, num_hidden_layers=3)).eval()
    told: list[tuple[str, float]] = []
    with listening(lambda words, share: told.append((words, share))):
        peftfx.export_onnx(model, tmp_path / "onnx")
    words = [text for text, _ in told]
    assert {"1 of 3 layers", "3 of 3 layers", "sites", "0 of 6 calls"} <= {*words}
    assert all(0 <= share <= 1 for _, share in told)
    said = {level: [r.getMessage() for r in logged if r.levelno == level] for level in (logging.INFO, logging.DEBUG)}
    assert said == {logging.INFO: ["capture", "convert", "write", "verify"], logging.DEBUG: words}


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("900 mb", 9 * 10**8), ("12345", 12345)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "4TB!", "-1GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(PeftfxError, match="not a size"):
        parse_size(text)
