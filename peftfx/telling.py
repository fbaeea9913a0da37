"""Progress messages of long work: to the logger `peftfx`, and to listeners that show how far the work is.

The logger reports stages at INFO and their progress at DEBUG. Messages that a user should act on are warnings, and
results are returned; neither is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOG = logging.getLogger("peftfx")
LOG.addHandler(logging.NullHandler())

Listener = Callable[[str, float], object]
"""Called with words such as `12 of 32 layers`, and with the share of the stage that is done, from 0 to 1."""

_LISTENER: ContextVar[Listener | None] = ContextVar("peftfx_listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send the progress of work in this thread to `listener` until the `with` block ends."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell_share(words: str, share: float) -> None:
    """Report which share of a stage is done, from 0 to 1, with words for it."""
    LOG.debug("%s", words)
    listener = _LISTENER.get()
    if listener is not None:
        listener(words, share)


def tell_stage(name: str) -> None:
    """Log that a stage begins."""
    LOG.info("%s", name)
