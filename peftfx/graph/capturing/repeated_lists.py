"""Repeated lists: during a capture, `torch.tensor([0] * batch)` is a tensor of free size.

Python makes a list of as many entries as the example has rows, which fixes the batch. Inside the context such a list is
not made before something reads it, and `torch.tensor` repeats the entries in the graph.
"""

from __future__ import annotations

import functools
import threading
from collections import UserList
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import SymInt, Tensor


class _Repeated(UserList[Any]):
    """A list, repeated a free number of times. Whatever reads its entries fixes that number."""

    def __init__(self, entries: list[Any], times: SymInt) -> None:
        self.entries, self.times = entries, times

    @functools.cached_property
    def data(self) -> list[Any]:  # type: ignore[override]
        return self.entries * int(self.times)

    @property
    def __class__(self) -> type:
        return list  # for code that asks with `isinstance`

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("a list keeps its class")


@contextmanager
def repeated_lists() -> Iterator[None]:
    """Keep the sizes by which lists are multiplied free in this thread. Not for two threads at once."""
    own, kept = threading.get_ident(), {name: getattr(SymInt, name) for name in ("__mul__", "__rmul__")}
    made = torch.tensor

    def multiplied(name: str) -> object:
        def multiply(size: SymInt, other: object) -> object:
            if type(other) is list and threading.get_ident() == own and size.node.maybe_as_int() is None:
                return _Repeated(list(other), size)
            return kept[name](size, other)

        return multiply

    @functools.wraps(made)
    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if type(data) is not _Repeated:
            return made(data, *args, **kwargs)
        if "data" in vars(data) or kwargs.get("requires_grad"):
            return made(data.data, *args, **kwargs)
        entries = made(data.entries, *args, **kwargs)
        return entries.repeat(data.times, *[1] * (entries.ndim - 1))

    for name in kept:
        setattr(SymInt, name, multiplied(name))
    torch.tensor = tensor
    try:
        yield
    finally:
        torch.tensor = made
        for name, method in kept.items():
            setattr(SymInt, name, method)
