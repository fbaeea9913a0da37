"""The class `AdapterSet`: the adapters of one model by name, and which of them are active."""

from __future__ import annotations

import keyword
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.contract.override import Override
from peftfx.errors import PeftfxError, nearest, shown, warn
from peftfx.views.row_adapters import NO_ADAPTER

_LONGEST = 200  #: the most bytes of an adapter's name, because the name becomes a folder's name
_NAME = re.compile(r'[^\x00-\x1f\x7f\ud800-\udfff./\\:*?"<>|]+')
"""Without dots, as in HF PEFT, because dots separate module names; and valid as a directory name on every system."""


class _Here(threading.local):
    """The names of the active adapters in one thread, inside `acting_as`; None outside."""

    names: tuple[str, ...] | None

    def __init__(self) -> None:
        self.names = None  # not a default of the class: see `_Current` in peftfx/hosting/call.py


class AdapterSet:
    """The adapters of one model: the child modules of `module`, each an `Adapter`.

    Attributes:
        folded: the names of the adapters that `merge_adapter` merged into the base's weights for now. While there are
            such adapters, calls add none.
        unfold: unmerges these adapters; None while none is merged.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._active: tuple[str, ...] = ()
        self._here = _Here()
        self.folded: tuple[str, ...] = ()
        self.unfold: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_here"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _here=_Here())

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the active adapters, in their order."""
        here = self._here.names
        return self._active if here is None else tuple([name for name in here if name in self.module._modules])

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        if self._here.names is None:
            self._active = names
        else:
            self._here.names = names

    @property
    def disabled(self) -> bool:
        """Whether this thread is inside `acting_as` without adapters: calls are of the base, whatever they name."""
        return self._here.names == ()

    def names(self) -> tuple[str, ...]:
        """Return the names of all adapters."""
        return tuple(name for name, _ in self.module.named_children())

    def __getitem__(self, name: str) -> Adapter:
        if not isinstance(name, str):
            raise PeftfxError(f"an adapter's name is a text, not {shown(name)}", "adapter_name", "pass its name")
        if name not in self.names():
            hint = nearest(name, self.names()) or f"adapters here: {', '.join(self.names()) or 'none'}"
            raise PeftfxError(f"there is no adapter named {name!r}", name, hint)
        found = self.module.get_submodule(name)
        assert isinstance(found, Adapter)
        return found

    def acting(self) -> list[Adapter]:
        """Return the adapters that calls add to the base."""
        return [self[name] for name in self.called]

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the adapters that calls add to the base: none while adapters are merged into its weights."""
        return () if self.folded else self.active

    def apart(self, what: str) -> None:
        """Unmerge what `merge_adapter` put into the base's weights, with a warning that names the reason `what`."""
        if self.unfold is not None:
            warn(f"{what}: the merged adapters {', '.join(self.folded)} are unmerged first")
            self.unfold()

    def refuse(self, name: str) -> None:
        """Refuse a `name` for a new adapter if it cannot name a folder and a module, or is taken."""
        if (
            not isinstance(name, str)
            or not _NAME.fullmatch(name)
            or name != name.strip()
            or len(name.encode()) > _LONGEST
        ):
            hint = "it must be a valid name of a directory, without dots, slashes, or spaces at its ends"
            raise PeftfxError(f"not a name for an adapter: {shown(name)}", "adapter_name", hint)
        if keyword.iskeyword(name):
            raise PeftfxError(
                f"an adapter's name cannot be a keyword of Python: {name!r}",
                "adapter_name",
                f"call it {name + '_'!r}, say",
            )
        if name == NO_ADAPTER:
            what = f"{name!r} is reserved: in adapter_names it means no adapter"
            raise PeftfxError(what, "adapter_name", "give it another name")
        if name in self.names():
            hint = "give it another name, or remove it first"
            raise PeftfxError(f"there is already an adapter named {name!r}", name, hint)
        if hasattr(self.module, name):
            raise PeftfxError(
                f"an adapter's name cannot be an attribute of torch modules: {name!r}",
                "adapter_name",
                "give it another name",
            )

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under a name, and make it the only active adapter."""
        self.module.add_module(name, adapter)
        self.activate((name,))

    def exchange(self, name: str, adapter: Adapter) -> None:
        """Put another adapter in the place of the one of this name: as active, and trained, as that one is."""
        trained = any(p.requires_grad for p in self[name].parameters())
        self.module._modules[name] = adapter.requires_grad_(trained)

    def activate(self, names: Sequence[str]) -> None:
        """Make these adapters the active ones, in this order; only they are trained.

        Inside `acting_as` the change lasts until the block ends, and does not change which adapters are trained.
        """
        self.apart("adapters are made active")
        self._check(names)
        self.active = tuple(names)
        if self._here.names is None:
            for name in self.names():
                self[name].requires_grad_(name in names)

    def _check(self, names: Sequence[str]) -> None:
        found = [self[name] for name in names]
        for name in names:
            if names.count(name) > 1:
                raise PeftfxError("an adapter is named twice", name, "name each adapter once")
        _refuse_rivals(dict(zip(names, found, strict=True)))

    @contextmanager
    def acting_as(self, names: Sequence[str] = ()) -> Iterator[None]:
        """Make these adapters the active ones in this thread, until the `with` block ends."""
        self.apart("a call is to have other adapters, or none")
        self._check(names)
        before = self._here.names
        self._here.names = tuple(names)
        try:
            yield
        finally:
            self._here.names = before

    def drop(self, name: str) -> None:
        """Remove the adapter of this name; the other adapters do not change."""
        self[name]
        delattr(self.module, name)
        self._active = tuple(a for a in self._active if a != name)


def _refuse_rivals(adapters: dict[str, Adapter]) -> None:
    """Refuse adapters that cannot act together: two soft prompts, or two copies of one tensor of the base."""
    soft = [n for n, a in adapters.items() if a.placements.prompts]
    if len(soft) > 1:
        what = f"the soft prompts of {soft[0]!r} and {soft[1]!r} cannot both be ahead of the text"
        raise PeftfxError(what, soft[1], "make one of them active at a time")
    owners: dict[str, list[tuple[str, Override]]] = {}
    for name, adapter in adapters.items():
        for override in adapter.overrides:
            others = owners.setdefault(override.key, [])
            for owner, other in others:
                if _equal_and_untrained((adapters[owner], other), (adapter, override)):
                    continue
                if not other.rows or set(other.rows) & set(override.rows):
                    what = f"the adapters {owner!r} and {name!r} both train their own copy of this"
                    raise PeftfxError(what, override.key.partition(".")[2], "make one of them active at a time")
            others.append((name, override))


def _equal_and_untrained(*kept: tuple[Adapter, Override]) -> bool:
    """Return whether two adapters have only read the same values of a tensor: those of one base that was resized."""
    if any(override.trained for _, override in kept):
        return False
    one, other = (adapter.get(override.key) for adapter, override in kept)
    return one.shape == other.shape and torch.equal(one, other.to(one.device))
