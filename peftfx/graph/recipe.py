"""Recipe: how a graph computes a weight that is made from other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Get = Callable[[str], Tensor]
"""How a recipe reads a tensor of the graph, by its `get_attr` target."""


class Recipe(Protocol):
    """The computation of a weight from other weights, which a graph keeps in place of the weight."""

    def evaluate(self, get: Get) -> Tensor:
        """Return the weight's current value. `get` reads the graph's tensors."""
