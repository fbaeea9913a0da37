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
_AGAIN = 0.2  #: seconds between two looks at whether the exception was lost


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
    does, the context still ends by Terminated. If no code deals with the exception, it was lost, as in a `__del__`, in
    which Python raises nothing: it is raised again. After the context no such signal is heard: the program ends.

    Python calls handlers only in the main thread. In another thread, this context changes nothing.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    heard: list[tuple[int, float]] = []
    looks = over = False
    outer: BaseException | None = None  # what the interrupted code was dealing with

    def end(number: int, _: FrameType | None) -> None:
        nonlocal looks, outer
        look, looks = looks, False
        now, dealt = time.monotonic(), sys.exc_info()[1]
        if look and dealt is not None and dealt is not outer:
            return  # the clean-up
        if look or not heard or now - heard[-1][1] > _PAUSE:
            if not heard:
                _thread.start_new_thread(keep_looking, (number,))  # threading's locks may be held here
            heard.append((number, now))
            outer = dealt
            raise Terminated(number)

    def keep_looking(number: int) -> None:
        nonlocal looks
        while True:
            time.sleep(_AGAIN)
            if over:
                return
            looks = True
            _thread.interrupt_main(signal.Signals(number))

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Terminated):
            told(lost)

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
