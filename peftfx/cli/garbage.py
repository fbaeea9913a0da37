"""Python's garbage collector in a process that runs a command."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator

from peftfx.memory.garbage import rarely_collected

_COUNTS = "triton._C.libtriton"  #: a module, of torch for CUDA, that reports at the end what was not freed


@contextlib.contextmanager
def rarely_to_the_end() -> Iterator[None]:
    """Collect garbage rarely in this context, and not at all when the process ends."""
    atexit.register(_leave)
    with rarely_collected():
        yield


def _leave() -> None:
    """Keep Python from looking through millions of objects at its end, to free them just before it exits.

    Where a module reports what was not freed, Python frees them.
    """
    if _COUNTS in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()


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
