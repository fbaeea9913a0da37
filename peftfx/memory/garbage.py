"""Python's garbage collector while a model is captured or exported: it looks through all objects less often."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

#: New objects until young ones are looked through, how many times that happens until older ones are, and those until
#: all are. By default 700, 10, 10: imports and captures make objects by the hundred thousand, and hardly any old ones
#: are garbage in circles.
_THRESHOLDS = (10_000, 10, 50)

_CHANGE = threading.Lock()
_before: list[tuple[int, ...]] = []  # one entry for each context that lasts, in any thread: what the first one found


@contextlib.contextmanager
def rarely_collected() -> Iterator[None]:
    """Collect garbage rarely in this context. What was set before is set again when the last such context ends."""
    with _CHANGE:
        _before.append(_before[0] if _before else gc.get_threshold())
        if 0 < gc.get_threshold()[0] < _THRESHOLDS[0]:  # 0 is never
            gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        with _CHANGE:
            found = _before.pop()
            if not _before:
                gc.set_threshold(*found)
