"""Turn signals that end a program into an exception, so that half-written files are removed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

#: Sent by `kill` and service managers; by a terminal that is closed; on Windows, by Ctrl+Break and to end a process
#: group.
_NAMES = ("SIGTERM", "SIGHUP", "SIGBREAK", "SIGINT")
_PAUSE = 1.0  #: seconds


class Terminated(BaseException):
    """Raised when a signal asks the program to end.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.signal = number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Make signals that end a program raise Terminated in this context. Signals with other handlers are left alone.

    A signal within a second of another is ignored: it would interrupt the clean-up. A later one is raised again: where
    the first was raised, other code may have caught it. If that code raises an error of its own, as torch's C++ code
    does, the context still ends by Terminated. After the context no such signal is heard: the program ends.

    Python calls handlers only in the main thread. In another thread, this context changes nothing.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    heard: list[tuple[int, float]] = []

    def end(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not heard or now - heard[-1][1] > _PAUSE:
            heard.append((number, now))
            raise Terminated(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if heard:
            raise Terminated(heard[-1][0]) from error
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_IGN if heard else before[number])
