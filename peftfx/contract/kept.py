"""Kept: what an adapter keeps of one place, for methods that change it between the steps of a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor


class Kept(Protocol):
    """One place of a rule, with its parameters and what training remembers."""

    @property
    def key(self) -> str:
        """The name of the place in the adapter, for messages."""

    def params(self) -> Mapping[str, Tensor]:
        """Return the parameters by name. They are the adapter's own tensors, to be changed in place."""

    def remembered(self) -> Mapping[str, Tensor]:
        """Return the tensors that training remembers beside the parameters, by name; see `Method.remembered`."""

    def remember(self, name: str, value: Tensor) -> None:
        """Keep `value` under `name` until it is forgotten. A checkpoint saves it."""

    def forget(self, names: Collection[str]) -> None:
        """Drop the remembered tensors of these `names`, where they exist."""
