"""Progress: stages, bytes, rate and time left."""

from __future__ import annotations

import re

import pytest

from peftfx.cli.progress import Progress, written_line
from peftfx.errors import PeftfxError
from peftfx.options import parse_size


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


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("900 mb", 9 * 10**8), ("12345", 12345)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "4TB!", "-1GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(PeftfxError, match="not a size"):
        parse_size(text)
