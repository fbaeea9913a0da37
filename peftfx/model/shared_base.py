"""shared_base: what the adapted models over one base have in common: its parameters, and whether these are trained."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from peftfx.bases.guests import own_parameters
from peftfx.errors import PeftfxError


class OverBase(Protocol):
    """An adapted model, as the others over its base see it."""

    def names(self) -> tuple[str, ...]:
        """Of its adapters."""

    def base_changed(self) -> None:
        """The base is another now: what was made from it is of no use."""


class SharedBase:
    """The adapted models over one base.

    The base is frozen while one of them has an adapter, and trains what it trained before when none has.
    """

    def __init__(self) -> None:
        self.users: WeakSet[OverBase] = WeakSet()
        self.trained: dict[str, bool] = {}

    def freeze(self, base: nn.Module) -> None:
        """The first adapter over the base is there: remember what is trained, and freeze it."""
        if not any(user.names() for user in self.users):
            # What a model that is gone has left frozen was trained before.
            named = own_parameters(base, remove_duplicate=False)
            self.trained = {key: p.requires_grad or self.trained.get(key, False) for key, p in named}
            base.requires_grad_(False)

    def thaw(self, base: nn.Module) -> None:
        """The last adapter over the base is gone: what was trained before is so again."""
        if not any(user.names() for user in self.users):
            for key, p in own_parameters(base, remove_duplicate=False):
                p.requires_grad_(self.trained.get(key, p.requires_grad))
            self.trained = {}

    def refuse_others(self, user: OverBase) -> None:
        """Refuse to write into the base where another model's adapters act on it."""
        if any(other.names() for other in self.users if other is not user):
            gc.collect()  # some that nobody holds may wait for it
        names = [name for other in self.users if other is not user for name in other.names()]
        if names:
            hint = "remove its adapters first, or adapt a copy of the base (copy.deepcopy)"
            raise PeftfxError("a merge would change the base under another adapted model", ", ".join(names), hint)

    def changed(self) -> None:
        """The base's weights are others now."""
        for user in list(self.users):
            user.base_changed()


_SHARED: WeakKeyDictionary[nn.Module, SharedBase] = WeakKeyDictionary()


def shared(base: nn.Module, user: OverBase, trained: Mapping[str, bool] | None = None) -> SharedBase:
    """What the models over this base share, with one more of them; a copied one says what its base trained before."""
    found = _SHARED.setdefault(base, SharedBase())
    found.users.add(user)
    found.trained |= trained or {}
    return found
