"""Python's garbage collector while a command runs: it looks through all objects less often than by default."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator

#: New objects until young ones are looked through, and how many times that happens until older ones are. By default
#: 700: imports and captures make objects by the hundred thousand, and hardly any are garbage in circles.
_THRESHOLDS = (10_000, 10, 10)


@contextlib.contextmanager
def rarely_collected() -> Iterator[None]:
    """Collect garbage rarely in this context, and not at all when the process ends."""
    before = gc.get_threshold()
    gc.set_threshold(*_THRESHOLDS)
    # Python's own end would look through millions of objects, to free them just before it exits.
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def kept_to_the_end() -> Iterator[None]:
    """Collect no garbage while modules are imported in this context, and never look through them again.

    In a process that has torch already, nothing is changed: there a command is a call among others.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
