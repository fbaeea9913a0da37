"""Turn signals that end a program into an exception, so that half-written files are removed."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

#: Sent by `kill` and service managers; by a terminal that is closed; on Windows, by Ctrl+Break and to end a process
#: group.
_NAMES = ("SIGTERM", "SIGHUP", "SIGBREAK", "SIGINT")
_PAUSE = 1.0  #: seconds
_AGAIN = 0.2  #: seconds after which a dropped exception is raised again: not in the code that tells of it


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
    does, the context still ends by Terminated. Where Python drops an exception, as in a `__del__`, it tells so, and the
    exception is raised again. After the context no such signal is heard: the program ends.

    Python calls handlers only in the main thread. In another thread, this context changes nothing.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    heard: list[tuple[int, float]] = []
    lost = over = False

    def end(number: int, _: FrameType | None) -> None:
        nonlocal lost
        now, again, lost = time.monotonic(), lost, False
        if again or not heard or now - heard[-1][1] > _PAUSE:
            heard.append((number, now))
            raise Terminated(number)

    def again_soon(number: int) -> None:
        nonlocal lost
        time.sleep(_AGAIN)
        if not over:
            lost = True
            _thread.interrupt_main(signal.Signals(number))

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Terminated):
            _thread.start_new_thread(again_soon, (dropped.exc_value.signal,))  # threading's locks may be held here
        else:
            told(dropped)

    told, sys.unraisablehook = sys.unraisablehook, unraisable
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if heard:
            raise Terminated(heard[-1][0]) from error
        raise
    finally:
        over = True
        sys.unraisablehook = told
        for number in ours:
            signal.signal(number, signal.SIG_IGN if heard else before[number])
