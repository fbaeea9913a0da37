"""Kept: what an adapter keeps of one place, for methods that change it between the steps of a training; its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

#: The adapter's own attributes. A module of the base may have the same name: T5's embeddings are `shared`.
OWN_ATTRIBUTES = frozenset(
    {
        *("accounts", "add", "all_of", "asked", "copy_overridden", "create", "excluding", "gathered", "get", "hosted"),
        *("keys", "moved_with_base", "named", "overrides", "params", "penalty", "placed", "placements", "put", "ran"),
        *("recall", "records", "reschedule", "rules", "settle_dropout", "share", "shared", "start", "tensors"),
        "unread",
    }
)


def kept_name(path: str) -> str:
    """Return the dotted name in the adapter for a module of the base: its path, unless an attribute has that name."""
    first, dot, rest = path.partition(".")
    return f"{first}_of_base{dot}{rest}" if first in OWN_ATTRIBUTES else path


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
