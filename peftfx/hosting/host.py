"""Host modules: a module gets another class, which also runs adapters, and later its own class back.

The forward of the new class runs the module's own forward and then the adapters that act there in this call. A tensor
that adapters have copies of becomes a property. A module before whose text virtual tokens come is called in another way
(`bases/embedded_text.py`). Outside of an adapted model's call the module behaves as before. Copies and pickles of the
module have its own class, and no guests.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.bases.embedded_text import ASKS, call_asking
from peftfx.bases.guests import GUESTS, OWN_CLASS, own_class
from peftfx.errors import PeftfxError
from peftfx.hosting.by_row import run_by_row
from peftfx.hosting.call import CURRENT, acting, reading_once
from peftfx.hosting.checkpointing import recomputed
from peftfx.hosting.guests import Attending, AttentionGuest, Hosted, other_call
from peftfx.hosting.seating import torch_layer_of
from peftfx.twins.offloaded import OWN_FORWARD


def guests_of(module: nn.Module) -> Hosted:
    """Return what acts in a module, after making an empty `Hosted` if there is none."""
    found = module._modules.get(GUESTS)
    if isinstance(found, Hosted):
        return found
    made = Hosted()
    module._modules[GUESTS] = made
    return made


def dress(module: nn.Module, *, inner: bool = False) -> None:
    """Give a module the class that runs its guests.

    Raises:
        PeftfxError: other code gave the module another class after it got guests, and that class cannot run them.
    """
    copied, asks = frozenset(guests_of(module).copies), bool(guests_of(module).texts)
    own, before = own_class(module), type(module)
    inner = inner or issubclass(before, _Inner)
    wanted = _hosting(own, copied, torch_layer_of(own) if inner else None, asks)  # type: ignore[arg-type]
    if OWN_CLASS in vars(before) or before is own:
        _reclass(module, wanted)
    elif not (copied <= _copied(before) and inner == issubclass(before, _Inner)):
        what = f"other code changed this module's class to {before.__name__} after an adapter was added"
        raise PeftfxError(what, type(module).__name__, "add all adapters first, and wrap or shard the model then")


def undress(module: nn.Module) -> None:
    """Give a module without guests its own class back, unless other code has set another class since."""
    del module._modules[GUESTS]
    if OWN_CLASS in vars(type(module)):
        _reclass(module, own_class(module))


def _reclass(module: nn.Module, wanted: type[nn.Module]) -> None:
    """Set a module's class, and update its forward where that is set on the module, or kept by accelerate's hooks."""
    before, module.__class__ = type(module).forward, wanted
    vars(module).update(_bound_anew(vars(module), before, wanted, module))


def _bound_anew(
    members: Mapping[str, Any], before: Callable[..., Any], wanted: type[nn.Module], module: nn.Module
) -> dict[str, MethodType]:
    """Return those of a module's members that are its forward, as the forward of the wanted class.

    The package `kernels` sets the class's own forward on a module for which it has no kernel.
    """
    kept = {name: members.get(name) for name in ("forward", OWN_FORWARD)}
    ours = (n for n, method in kept.items() if isinstance(method, MethodType) and method.__func__ is before)
    return {name: MethodType(wanted.forward, module) for name in ours}


class _Inner:
    """A marker base class: guests act inside the forward of torch's own layer, which the module's forward calls."""


def _copied(cls: type) -> frozenset[str]:
    return frozenset(
        name for c in cls.__mro__ if OWN_CLASS in vars(c) for name in vars(c) if isinstance(vars(c)[name], _Read)
    )


@functools.cache
def _hosting(
    own: type[nn.Module], copied: frozenset[str], layer: type[nn.Module] | None, asks: bool
) -> type[nn.Module]:
    """Return the hosting subclass of a class.

    Args:
        own: the class.
        copied: the tensors that are properties.
        layer: the class of torch's in whose forward the guests act, if they do not act around the module's forward.
        asks: whether virtual tokens come before the text that the module embeds.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        guests, keys = self._modules.get(GUESTS), CURRENT.keys
        if not isinstance(guests, Hosted):
            return own.forward(self, *args, **kwargs)
        if keys is None and (before := recomputed(guests.acted)) is not None:
            with acting(before):
                return forward(self, *args, **kwargs)
        guests.note_call()
        if CURRENT.rows is not None:
            return run_by_row(self, guests, args, kwargs)
        if not keys:
            return own.forward(self, *args, **kwargs)
        if guests.matches:
            return guests.join(self, ran(self, guests, args, kwargs), args, kwargs)
        return ran(self, guests, args, kwargs)

    def ran(self: nn.Module, guests: Hosted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if guests.folds and CURRENT.read is None and not torch.compiler.is_compiling():
            with reading_once():
                return ran(self, guests, args, kwargs)
        if guests.attentions and (attending := guests.attending(CURRENT.keys or ())):
            return _attend(own, self, attending, args, kwargs)
        if layer is None:
            return guests.weigh(own.forward, self, args, kwargs)
        CURRENT.inner = False
        output = own.forward(self, *args, **kwargs)
        if not CURRENT.inner:
            raise other_call(own.__name__, f"it passed the forward of {layer.__name__} by")
        return output

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        make, args, state, *rest = super(made, self).__reduce_ex__(protocol)  # type: ignore[str-unpack]
        if isinstance(state, dict) and "_modules" in state:
            state = {**state, **_bound_anew(state, made.forward, own, self)}
            state["_modules"] = {n: m for n, m in state["_modules"].items() if n != GUESTS}
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make = _new  # pickle requires that `__newobj__` makes the object's own class
        return (make, tuple(own if arg is type(self) else arg for arg in args), state, *rest)

    members = {OWN_CLASS: own, "forward": forward, "__reduce_ex__": reduce, "__module__": own.__module__}
    members |= {"__qualname__": own.__qualname__, "__doc__": own.__doc__, **{name: _Read(name) for name in copied}}
    members |= {"__call__": call_asking(own), ASKS: True} if asks else {}
    bases = (own,) if layer is None else (own, _within(layer))  # type: ignore[arg-type]
    made: type[nn.Module] = type(own.__name__, bases, members)
    made.forward.__wrapped__ = own.forward  # type: ignore[attr-defined]
    return made


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    own: type[nn.Module],
    module: nn.Module,
    guests: Sequence[AttentionGuest],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> object:
    """Run a module in which attention methods act; not compiled, because compiled they may act twice at one value."""
    with Attending(module, guests) as mode:
        output = own.forward(module, *args, **kwargs)
    return mode.leaving(output)


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


@functools.cache
def _within(layer: type[nn.Module]) -> type[nn.Module]:
    """Return a class that comes before torch's own layer in the method order and runs the guests there."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        guests, CURRENT.inner = self._modules.get(GUESTS), True
        if not isinstance(guests, Hosted):
            return layer.forward(self, *args, **kwargs)
        return guests.weigh(layer.forward, self, args, kwargs)

    return type(layer.__name__, (layer, _Inner), {"forward": forward, "__module__": layer.__module__})


class _Read(property):
    """A property for a module's tensor: the tensor as the active adapters replace it."""

    def __init__(self, name: str) -> None:
        def read(module: nn.Module) -> Tensor | None:
            held = module._parameters if name in module._parameters else module._buffers
            if name not in held:
                raise AttributeError(name)
            own, guests = held[name], module._modules.get(GUESTS)
            if own is None or not CURRENT.keys or not isinstance(guests, Hosted) or name not in guests.copies:
                return own
            return guests.read(name, own)

        def write(module: nn.Module, value: object) -> None:
            what = f"a plain tensor replaces the parameter {name}, of which an adapter has a copy"
            hint = "FSDP1 does so, and is not supported: use FSDP2, torch.distributed.fsdp.fully_shard on the layers"
            raise PeftfxError(what, type(module).__name__, hint)

        super().__init__(read, write)
