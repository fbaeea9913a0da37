"""The adapters that act in the present call of a base, for each thread; outside of an adapted model's call none act."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from torch import Tensor

Keys = tuple[str, ...]
"""The keys of adapters (each made of its model's number and its name), in the order in which the adapters act."""
RowsByAdapter = tuple[tuple[Keys, Tensor], ...]
"""The rows of a batch by adapter: for each tuple of adapters, the numbers of the rows in which these act."""


class _Current(threading.local):
    keys: Keys | None  #: the adapters that act; None outside of a call
    given: Mapping[str, Tensor]  #: the inputs that methods read besides the model's own
    inner: bool  #: whether the forward of torch's own layer has run, inside a module that computes more
    rows: RowsByAdapter | None  #: the rows of each adapter, if rows have different ones; then `keys` is empty
    read: dict[tuple[int, str], Tensor] | None  #: what the running module has read of its tensors, if kept
    called: bool  #: whether the model's own forward has run, in a call for which other code has set `forward`
    entered: Keys | None  #: the adapters for which such a call's arguments are those of the base's modules

    def __init__(self) -> None:
        # Each thread has its own from the start: defaults of the class would become attributes in a compiled call, and
        # torch.compile's guards on what the object has would fail in the next.
        self.keys = self.rows = self.read = self.entered = None
        self.given = MappingProxyType({})
        self.inner = self.called = False


CURRENT = _Current()  #: what acts in this thread; every hosting module reads it each time that the module runs


@contextmanager
def acting(keys: Keys | None, given: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Let these adapters act, with these extra inputs, in this thread until the `with` block ends."""
    before = CURRENT.keys, CURRENT.given
    CURRENT.keys, CURRENT.given = keys, given or MappingProxyType({})
    try:
        yield
    finally:
        CURRENT.keys, CURRENT.given = before


@contextmanager
def acting_by_row(rows: RowsByAdapter | None) -> Iterator[None]:
    """Let each row of a batch have its own adapters, in this thread, until the `with` block ends; None: no rows."""
    before = CURRENT.rows
    CURRENT.rows = rows
    try:
        yield
    finally:
        CURRENT.rows = before


@contextmanager
def reading_once() -> Iterator[None]:
    """Keep what a module reads of its adapted tensors until the `with` block ends: loops read them again and again."""
    before = CURRENT.read
    CURRENT.read = {}
    try:
        yield
    finally:
        CURRENT.read = before
