"""A value that several tensors are written from. It is computed once, and kept until the last tensor is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Once(Generic[Made]):
    """A value from which several tensors are written, one after the other. It is computed only once."""

    def __init__(self, make: Callable[[], Made], count: int) -> None:
        self.make, self.count = make, count
        self.made: Made | None = None
        self.left: set[int] = set()

    def take(self, number: int) -> Made:
        """Return the value for the tensor with this number. It is computed again if that tensor has had it already."""
        if self.made is None or number not in self.left:
            self.made, self.left = self.make(), set(range(self.count))
        made = self.made
        self.left.discard(number)
        if not self.left:
            self.made = None
        return made
