"""A signal ends a command also where other code makes an error of its own of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from peftfx.cli.signals import Terminated, orderly_end

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


@pytest.fixture(params=SIGNALS[:2], ids=lambda s: s.name)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal; after the test all are heard as before, which the end of a command ignores."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS}  # a run in the background ignores some
    yield int(request.param)
    for each, handler in before.items():
        signal.signal(each, handler)


def as_an_error_of_its_own(number: int) -> None:
    """As torch's C++ code does it: a merge then said that the model cannot be captured."""
    try:
        os.kill(os.getpid(), number)
    except Terminated as end:
        raise RuntimeError(f"empty_permuted(): argument 'size' failed to unpack: {end}") from None


def test_an_error_made_of_a_signal_is_the_signal(number: int) -> None:
    with pytest.raises(Terminated) as raised, orderly_end():
        as_an_error_of_its_own(number)
    assert raised.value.signal == number


class Lost:
    """Something that is collected when a signal comes, as torch's references to storages."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


def test_a_signal_that_python_ignores_is_raised_again(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    ends, cleaned = time.monotonic() + 10, False

    def run() -> None:
        nonlocal cleaned
        Lost(number)
        try:
            while time.monotonic() < ends:
                time.sleep(0.01)
        finally:
            time.sleep(0.5)  # the clean-up is not interrupted
            cleaned = True

    with pytest.raises(Terminated), orderly_end():
        run()
    assert cleaned
    assert time.monotonic() < ends
    assert capsys.readouterr().err == ""


def test_an_error_without_a_signal_is_itself(number: int) -> None:
    with pytest.raises(RuntimeError, match="another"), orderly_end():
        raise RuntimeError("another")
    with orderly_end(), contextlib.suppress(Terminated):
        os.kill(os.getpid(), number)
