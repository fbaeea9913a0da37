"""Signals that end a program: here they end it as an exception does, so that what is half-written goes away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

#: of `kill` and of service managers; of a terminal that is closed; of Ctrl+Break, and of what ends a group, on Windows
_NAMES = ("SIGTERM", "SIGHUP", "SIGBREAK")


class Terminated(BaseException):
    """A signal asked the program to end.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        self.signal = number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Inside, a signal that ends a program raises Terminated. One that somebody else handles, or ignores, is left so.

    Python calls handlers in the main thread alone: in another thread nothing changes.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []

    def end(number: int, _: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # a second one would cut the cleaning short
        raise Terminated(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
