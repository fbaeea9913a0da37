"""Once: what several tensors are written from is made once, and kept until the last of them has been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Once(Generic[Made]):
    """What is written in several tensors is made once: they are written one after the other."""

    def __init__(self, make: Callable[[], Made], count: int) -> None:
        self.make, self.count = make, count
        self.made: Made | None = None
        self.left: set[int] = set()

    def take(self, number: int) -> Made:
        """What is made, for the tensor of this number; made anew for one that has had it."""
        if self.made is None or number not in self.left:
            self.made, self.left = self.make(), set(range(self.count))
        made = self.made
        self.left.discard(number)
        if not self.left:
            self.made = None
        return made
