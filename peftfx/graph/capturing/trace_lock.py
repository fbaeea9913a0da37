"""The lock between threads that trace models and threads that run them: torch patches modules for all threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class TraceLock:
    """A lock that one thread holds to trace, or any number of threads hold to run modules; `with` traces.

    A thread may take it again while it has it. A thread that runs modules and traces inside that, as code of a base
    can, does not wait for other threads that run theirs: two such threads would wait for each other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tracer: int | None = None
        self._depth = 0
        self._waiting = 0  # threads that wait to trace: no further thread starts to run modules
        self._running: Counter[int] = Counter()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._tracer != me:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._tracer is None and (not self._running or me in self._running))
                finally:
                    self._waiting -= 1
                self._tracer = me
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._tracer = None
                self._changed.notify_all()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let this thread run modules until the `with` block ends: no other thread traces meanwhile."""
        me = threading.get_ident()
        with self._changed:
            if self._tracer != me:
                self._changed.wait_for(lambda: self._tracer is None and (not self._waiting or me in self._running))
            self._running[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                    self._changed.notify_all()


TRACING = TraceLock()  #: held by a thread that captures or traces, and by those that run modules
