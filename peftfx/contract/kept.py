"""Kept: what an adapter keeps of one place, as a method sees it that changes it between the steps of a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor


class Kept(Protocol):
    """One place of a rule."""

    @property
    def key(self) -> str:
        """Its name in the adapter, for messages."""

    def params(self) -> Mapping[str, Tensor]:
        """The parameters, by name; the adapter's own, to be changed in place."""

    def remembered(self) -> Mapping[str, Tensor]:
        """What training remembers beside them, by name; see `Method.remembered`."""

    def remember(self, name: str, value: Tensor) -> None:
        """Keep this until it is forgotten: it is saved with a checkpoint."""

    def forget(self, names: Collection[str]) -> None:
        """Drop these, where they are."""
