"""What acts in a call of a base's modules, in this thread; outside of an adapted model's call it is nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

Keys = tuple[str, ...]
"""Adapters, each by the number of its model and its name, in the order in which they act."""


class _Current(threading.local):
    keys: Keys | None = None  #: None outside of a call
    inner: bool = False  #: whether the forward of torch's own layer has run, within a module that computes more
    called: bool = False  #: whether the adapted model's own forward has run, in a call whose forward others have set


CURRENT = _Current()  #: read by every module that hosts something, each time that it runs


@contextmanager
def acting(keys: Keys | None) -> Iterator[None]:
    """Inside, in this thread, these adapters act."""
    before = CURRENT.keys
    CURRENT.keys = keys
    try:
        yield
    finally:
        CURRENT.keys = before
