"""Recipe: what a graph keeps in place of a weight that is made from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Get = Callable[[str], Tensor]
"""How a recipe reads a tensor of the graph, by its `get_attr` target."""


class Recipe(Protocol):
    """What a graph keeps in place of a weight that is made from others."""

    def evaluate(self, get: Get) -> Tensor:
        """Its value now, given how to read the graph's tensors."""
