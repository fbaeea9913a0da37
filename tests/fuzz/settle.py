"""What holds of every case: it works, or it is one clear error; soon, either way."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, Phase, settings

from peftfx import PeftfxError
from peftfx.cli.main import main

LINES, CHARACTERS = 26, 2500  #: one screen
LIMIT = 5.0  #: seconds that a spoiled case may take beyond its twin


@dataclass(frozen=True)
class Outcome:
    """What a call came to: a value, or an error's message."""

    value: object = None
    message: str = ""


class TooLong(BaseException):
    """The case hangs. It derives from BaseException, so that nothing takes it for bad input."""


def settle(call: Callable[[], object], seconds: float = LIMIT) -> Outcome:
    """Call; anything but a value or a PeftfxError that fits on one screen goes through to the test."""
    with within(seconds):
        try:
            return Outcome(call())
        except PeftfxError as error:
            return Outcome(message=readable(str(error)))


def readable(message: str) -> str:
    """The message, if it fits on one screen and says something."""
    assert message.strip()
    assert len(message.split("\n")) <= LINES, message[:3000]
    assert len(message) <= CHARACTERS, message[:3000]
    assert "Traceback" not in message
    return message


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TooLong` where what is inside computes for longer; what else the machine does counts for nothing."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> int:
    """The exit code of a command line; where it is 2 the user reads one message and no traceback."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["peftfx", *words])
    with within(LIMIT), pytest.raises(SystemExit) as raised:
        main()
    code, said = raised.value.code or 0, capsys.readouterr()
    assert code in (0, 2), said.err[:3000]
    if code == 2:
        assert "Traceback" not in said.err
        if "Usage: " not in said.err + said.out:
            if "--json" in words:
                assert json.loads(said.out)["error"]["exit_code"] == 2
            else:
                assert said.out == ""
            assert said.err.count("peftfx: error: ") == 1
            readable(said.err.partition("peftfx: error: ")[2].strip())
    return int(code)


def tree(root: Path) -> dict[Path, bytes | None]:
    """Every file below a directory, to tell that nothing was written."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def cases(quick: int, many: int) -> pytest.MarkDecorator:
    """How many cases a default run has, always the same ones, and how many `pytest -m fuzz` has, new ones each time."""
    return pytest.mark.parametrize(
        "cases",
        [
            pytest.param(_settings(quick, derandomize=True), id="quick"),
            pytest.param(_settings(many, derandomize=False), id="many", marks=pytest.mark.fuzz),
        ],
    )


def _settings(count: int, *, derandomize: bool) -> settings:
    return settings(
        max_examples=count,
        derandomize=derandomize,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
