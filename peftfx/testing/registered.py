"""known: a method that files and rules know for a while, whether or not it is registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import peftfx.methods as table
from peftfx.contract.method import Method


@contextmanager
def known(cls: type[Method]) -> Iterator[None]:
    """Inside, the method's type is this class."""
    before = dict(table._registered)
    table._registered[cls.peft_type] = cls
    try:
        yield
    finally:
        table._registered.clear()
        table._registered.update(before)
