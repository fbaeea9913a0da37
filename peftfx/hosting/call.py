"""What acts in a call of a base's modules, in this thread; outside of an adapted model's call it is nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from torch import Tensor

Keys = tuple[str, ...]
"""Adapters, each by the number of its model and its name, in the order in which they act."""
RowsByAdapter = tuple[tuple[Keys, Tensor], ...]
"""The rows of a batch by the adapters that act in them: for each set of these, the numbers of its rows."""


class _Current(threading.local):
    keys: Keys | None = None  #: None outside of a call
    given: Mapping[str, Tensor] = MappingProxyType({})  #: inputs that methods read beside the model's own
    inner: bool = False  #: whether the forward of torch's own layer has run, within a module that computes more
    rows: RowsByAdapter | None = (
        None  #: in a call of rows with an adapter each: which rows have which; `keys` is empty then
    )
    called: bool = False  #: whether the adapted model's own forward has run, in a call whose forward others have set


CURRENT = _Current()  #: read by every module that hosts something, each time that it runs


@contextmanager
def acting(keys: Keys | None, given: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside, in this thread, these adapters act, and read these inputs of the call beside the model's own."""
    before = CURRENT.keys, CURRENT.given
    CURRENT.keys, CURRENT.given = keys, given or MappingProxyType({})
    try:
        yield
    finally:
        CURRENT.keys, CURRENT.given = before


@contextmanager
def acting_by_row(rows: RowsByAdapter | None) -> Iterator[None]:
    """Inside, in this thread, each row of a batch has its adapters; None ends that, for what runs some rows alone."""
    before = CURRENT.rows
    CURRENT.rows = rows
    try:
        yield
    finally:
        CURRENT.rows = before
