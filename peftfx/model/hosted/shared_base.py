"""The adapted models that share one base, and which of its parameters were trained before."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from peftfx.bases.guests import own_parameters
from peftfx.errors import PeftfxError


class OverBase(Protocol):
    """An adapted model, as the other models over its base see it."""

    def names(self) -> tuple[str, ...]:
        """Return the names of its adapters."""

    def base_changed(self) -> None:
        """Drop what was made from the base, because the base has changed."""


class SharedBase:
    """The adapted models over one base.

    Attributes:
        users: these models.
        lenders: models of HF PEFT whose base's tensors these are.
        trained: whether each parameter of the base was trained before.

    The base is frozen while one of the models has an adapter. When none has one any more, the parameters that were
    trained before are trained again.
    """

    def __init__(self) -> None:
        self.users: WeakSet[OverBase] = WeakSet()
        self.lenders: WeakSet[nn.Module] = WeakSet()
        self.trained: dict[str, bool] = {}

    def freeze(self, base: nn.Module) -> None:
        """Freeze the base before its first adapter is added, and remember which parameters were trained."""
        if not any(user.names() for user in self.users):
            # A deleted model may have left parameters frozen that were trained before it: these count as trained.
            named = own_parameters(base, remove_duplicate=False)
            self.trained = {key: p.requires_grad or self.trained.get(key, False) for key, p in named}
            base.requires_grad_(False)

    def thaw(self, base: nn.Module) -> None:
        """Train the parameters that were trained before, after the base's last adapter was removed."""
        if not any(user.names() for user in self.users):
            for key, p in own_parameters(base, remove_duplicate=False):
                p.requires_grad_(self.trained.get(key, p.requires_grad))
            self.trained = {}

    def refuse_others(self, user: OverBase) -> None:
        """Refuse to write into the base while another model has adapters on it."""
        if self.lenders or any(other.names() for other in self.users if other is not user):
            gc.collect()  # models that are no longer in use may wait for the garbage collector
        names = [name for other in self.users if other is not user for name in other.names()]
        if names:
            hint = "remove its adapters first, or adapt a copy of the base (copy.deepcopy)"
            raise PeftfxError("a merge would change the base under another adapted model", ", ".join(names), hint)
        if lenders := ", ".join(type(lender).__name__ for lender in self.lenders):
            what = "a merge would change the base under the model of peft that the adapters were taken from"
            raise PeftfxError(what, lenders, "delete that model first (del), or adapt a copy of it (copy.deepcopy)")

    def changed(self) -> None:
        """Tell all models over the base that its weights have changed."""
        for user in list(self.users):
            user.base_changed()


_SHARED: WeakKeyDictionary[nn.Module, SharedBase] = WeakKeyDictionary()


def shared(base: nn.Module, user: OverBase, trained: Mapping[str, bool] | None = None) -> SharedBase:
    """Return what the models over this base share, with `user` added; a copied model brings its own `trained`."""
    found = _SHARED.setdefault(base, SharedBase())
    found.users.add(user)
    found.trained |= trained or {}
    return found
