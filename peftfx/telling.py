"""What long work tells while it runs: to the logger `peftfx`, and to who listens for how far it is.

The logger has stages at INFO, and what they are made of at DEBUG. What a user should act on is a warning, and what was
asked for is a result: neither is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOG = logging.getLogger("peftfx")
LOG.addHandler(logging.NullHandler())

Listener = Callable[[str, float], object]
"""Called with words, as `12 of 32 layers`, and with the share of the stage that is done, from 0 to 1."""

_LISTENER: ContextVar[Listener | None] = ContextVar("peftfx_listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Inside, in this thread, work tells how far it is."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell_share(words: str, share: float) -> None:
    """Say how far a stage is."""
    LOG.debug("%s", words)
    listener = _LISTENER.get()
    if listener is not None:
        listener(words, share)


def tell_stage(name: str) -> None:
    """Log that a stage begins."""
    LOG.info("%s", name)
