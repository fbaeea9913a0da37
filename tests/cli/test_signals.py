"""A signal ends a command also where other code makes an error of its own of it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from peftfx.cli.signals import Terminated, orderly_end


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    before = signal.signal(request.param, signal.SIG_DFL)  # tests that run in the background inherit that it is ignored
    yield int(request.param)
    signal.signal(request.param, before)


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
