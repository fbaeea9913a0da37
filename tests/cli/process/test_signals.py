"""A signal ends a command also where other code makes an error of its own of it."""

from __future__ import annotations

import contextlib
import os
import signal
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


def test_an_error_without_a_signal_is_itself(number: int) -> None:
    with pytest.raises(RuntimeError, match="another"), orderly_end():
        raise RuntimeError("another")
    with orderly_end(), contextlib.suppress(Terminated):
        os.kill(os.getpid(), number)
