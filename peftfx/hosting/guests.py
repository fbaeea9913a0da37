"""What acts in one module, by adapter: weight methods, attention methods, pattern methods, and copies of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfx.adapters.adapter import Adapter, Holder
from peftfx.bases.guests import Guests
from peftfx.contract.acting import Acting, adapted, overlap
from peftfx.contract.completeness import asking, refuse_forward_output
from peftfx.contract.method import Op
from peftfx.errors import PeftfxError
from peftfx.hosting.call import CURRENT, Keys
from peftfx.hosting.call_inputs import read_call_inputs
from peftfx.hosting.replaced import Copy, FoldedTensor, Parameters
from peftfx.hosting.seats import AttentionSeat, PatternSeat, TextSeat, WeightSeat
from peftfx.passes.adaptation.attention import anonymous, attended
from peftfx.passes.adaptation.pattern import unnamed
from peftfx.twins.layers import WeightReader, is_quantised

_Forward = Callable[..., object]


class WeightGuest:
    """A weight method that acts at a module's output.

    Attributes:
        alone: whether the method never reads the module's output, so that the output need not be computed.
        asks: whether the method reads inputs of the call besides the model's own.
        adds: whether the method's term is rounded to the output's dtype before it is added, as in HF PEFT's layers over
            quantised ones.
        first: whether the method does not read the module's output if it is the first method that acts.
    """

    def __init__(self, seat: WeightSeat, adapter: Adapter, module: nn.Module) -> None:
        self.seat, self.placement, self.acting = seat, seat.placement, Acting.of(seat.placement)
        self.reader = WeightReader(module, seat.placement.site.shape) if is_quantised(module) else None
        self.alone = self.acting.method.reruns and self.acting.block is None
        self.first = self.acting.method.replaces and self.acting.block is None and self.reader is None
        self.adds = self.acting.method.adds and self.reader is not None
        self.params = Parameters(adapter, adapter.keys(seat.placement))
        self.asks = bool(self.acting.method.inputs or self.acting.method.invoked_by)

    def act(
        self, own: _Forward, module: nn.Module, x: Tensor, y: Tensor | None, before: Sequence[WeightGuest]
    ) -> Tensor:
        """Return the module's output with the effect of this method.

        Args:
            own: the module's own forward.
            module: the module.
            x, y: the module's input, and its output before this method acts.
            before: the methods that have acted at this module before.
        """
        bias = None if self.seat.bias is None else getattr(module, self.seat.bias)
        stored = module.weight if self.reader is None else self.reader(module, x.dtype), bias
        rerun: list[tuple[Acting, dict[str, Tensor]]] = []
        if before and self.acting.method.reruns:
            rerun = [(g.acting, g.params()) for g in before if overlap(g.placement, self.placement)]
        operation, p = self._operation(own, module, stored), self.params()  # type: ignore[arg-type]
        if self.asks:
            p |= read_call_inputs(self.acting.method, x)
        for tensor in p.values():
            if tensor.is_meta and not x.is_meta:
                raise _without_values(self.seat.path)
        on_cuda = torch.is_autocast_enabled("cuda")  # HF PEFT asks for CUDA's autocast, on the CPU too
        if not self.adds or y is None or y.element_size() > 2 or on_cuda:
            return adapted(self.acting, p, operation, x, y, stored, rerun, training=module.training)  # type: ignore[arg-type]
        nothing = y.new_zeros(()).expand_as(y)
        return y + adapted(self.acting, p, operation, x, nothing, stored, rerun, training=module.training)  # type: ignore[arg-type]

    def _operation(self, own: _Forward, module: nn.Module, stored: tuple[Tensor, Tensor | None]) -> Op:
        """Return the site's operation; a quantised layer runs its own forward as long as its weight is unchanged."""
        operation = self.seat.operation
        if self.reader is None:
            return operation

        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if weight is stored[0] and bias is stored[1]:
                return own(module, x)  # type: ignore[return-value]
            return operation(x, weight, bias)

        return run


class AttentionGuest:
    """An attention method at the fused attention that a module calls."""

    def __init__(self, seat: AttentionSeat, adapter: Adapter, base: nn.Module) -> None:
        self.behind, self.method, self.site = seat.behind, seat.placement.method, anonymous(seat.placement.site)
        self.params = Parameters(adapter, adapter.keys(seat.placement))
        heads = seat.placement.site.heads
        self.layers = base.get_submodule(heads.key), base.get_submodule(heads.value)

    def act(self, module: nn.Module, query: Tensor, y: Tensor) -> Tensor:
        """Return the output of the attention, or of the module, with the effect of this method."""
        p, (key, value) = self.params(), self.layers
        read = self.method.reads(p)
        read = read if is_quantised(key) else read.to(key.weight.dtype)  # type: ignore[arg-type]
        keys = key(read)
        values = keys if value is key else value(read)
        return attended(self.method, self.site, query, y, (keys, values), p, training=module.training)


class PatternGuest:
    """A pattern method at the output of a module that computes what the pattern computes."""

    def __init__(self, seat: PatternSeat, adapter: Adapter) -> None:
        self.path, self.method = seat.placement.site.path, seat.placement.method
        self.site, self.params = unnamed(seat.placement.site), Parameters(adapter, adapter.keys(seat.placement))

    def act(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the module's output with the effect of this method."""
        with asking(self.method, "forward", self.path):
            made = self.method.forward(self.site, x, y, self.params(), module.training)
        refuse_forward_output(self.method, self.path, made, y)
        return made


class Hosted(Guests):
    """All that acts in one module, by adapter; the adapters' parameters are its child modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, list[WeightGuest]] = {}
        self.attentions: dict[str, list[AttentionGuest]] = {}
        self.matches: dict[str, list[PatternGuest]] = {}
        self.texts: dict[str, TextSeat] = {}  #: of virtual tokens: see `bases/embedded_text.py`
        self.copies: dict[str, dict[str, Copy | FoldedTensor]] = {}
        self.kept: dict[str, list[str]] = {}
        self.acted: set[Keys | None] = set()  #: see `recomputed`
        self._found: dict[Keys, tuple[list[WeightGuest], int | None]] = {}

    def keep(self, key: str, owner: nn.Module) -> None:
        """Add the module `owner` of an adapter's parameters as a child, unless it is a child already."""
        self._found.clear()
        if not any(child is owner for child in self.children()):
            number = next(n for n in itertools.count() if f"{key}_{n}" not in self._modules)
            self.add_module(f"{key}_{number}", owner)
            if isinstance(owner, Holder):
                owner.hosted = True
            self.kept.setdefault(key, []).append(f"{key}_{number}")

    def drop(self, key: str) -> bool:
        """Remove all that an adapter brought; return whether anything is left."""
        self._found.clear()
        for table in self._tables():
            table.pop(key, None)
        for child in self.kept.pop(key, ()):
            owner = self._modules.pop(child)
            if isinstance(owner, Holder):
                owner.hosted = False
        self.copies = {name: table for name, table in self.copies.items() if table}
        return any(self._tables())

    def note_call(self) -> None:
        """Keep which adapters act in this call of the module."""
        keys = CURRENT.keys
        if keys is None:
            return
        acted = None if CURRENT.given or CURRENT.rows is not None else keys
        if acted not in self.acted and not torch.compiler.is_compiling():
            self.acted.add(acted)

    def hosts(self, keys: Keys) -> bool:
        """Return whether one of these adapters acts in this module."""
        return any(key in table for table in self._tables() for key in keys)

    def _tables(self) -> tuple[dict[str, Any], ...]:
        return (self.weights, self.attentions, self.matches, self.texts, *self.copies.values())

    def read(self, name: str, own: Tensor) -> Tensor:
        """Return a tensor of the module as the active adapters replace it; `own` is the module's own tensor."""
        if CURRENT.read is not None and (id(self), name) in CURRENT.read:
            return CURRENT.read[id(self), name]
        for key in CURRENT.keys or ():
            copy = self.copies[name].get(key)
            own = own if copy is None else copy.read(own)
        if CURRENT.read is not None:
            CURRENT.read[id(self), name] = own
        return own

    @property
    def folds(self) -> bool:
        """Whether methods are folded into a tensor of the module."""
        if not self.copies:  # as in most modules, at each of their calls
            return False
        return any(isinstance(copy, FoldedTensor) for table in self.copies.values() for copy in table.values())

    def weigh(self, own: _Forward, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Return the output of a module's own forward with all active weight methods."""
        keys = CURRENT.keys or ()
        found, alone = self._found.get(keys) or self._order(keys)
        y = own(module, *args, **kwargs) if alone is None else None
        for i in range(alone or 0, len(found)):
            path = found[i].seat.path
            if not (isinstance(y, Tensor) or (y is None and alone is not None)):
                raise other_call(path, f"it returned a {type(y).__name__}")
            y = found[i].act(own, module, _only_tensor(path, args, kwargs), y, found[:i])
        return y

    def _order(self, keys: Keys) -> tuple[list[WeightGuest], int | None]:
        """Return these adapters' weight methods in order, and which is the last that needs no output under it."""
        found = [guest for key in keys for guest in self.weights.get(key, ())]
        found.sort(key=lambda guest: guest.placement.on_weight is None)  # after methods at one weight
        alone = [i for i, guest in enumerate(found) if guest.alone or (i == 0 and guest.first)]
        self._found[keys] = found, alone[-1] if alone else None
        return self._found[keys]

    def join(self, module: nn.Module, y: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Return a module's output with all active pattern methods."""
        for guest in (guest for key in CURRENT.keys or () for guest in self.matches.get(key, ())):
            if not isinstance(y, Tensor):
                raise other_call(guest.path, f"it returned a {type(y).__name__}")
            y = guest.act(module, _only_tensor(guest.path, args, kwargs), y)
        return y

    def attending(self, keys: Keys) -> list[AttentionGuest]:
        """Return the attention methods of these adapters, in order."""
        return [guest for key in keys for guest in self.attentions.get(key, ())]


class Attending(TorchFunctionMode):
    """A torch function mode in which attention methods act where a module calls torch's fused attention."""

    def __init__(self, module: nn.Module, guests: Sequence[AttentionGuest]) -> None:
        super().__init__()
        self.module, self.guests = module, guests
        self.query: Tensor | None = None

    def __torch_function__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        y = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else (kwargs or {})["query"]
            assert isinstance(query, Tensor)
            self.query = query
            for guest in self.guests:
                y = y if guest.behind else guest.act(self.module, query, y)
        return y

    def leaving(self, output: object) -> object:
        """Return the module's output with the methods that act on the output.

        Raises:
            PeftfxError: the module has not called torch's fused attention.
        """
        if self.query is None:
            raise other_call(type(self.module).__name__, "it did not call torch's fused attention")
        for guest in self.guests:
            if guest.behind and isinstance(output, tuple):
                output = (guest.act(self.module, self.query, output[0]), *output[1:])
            elif guest.behind:
                assert isinstance(output, Tensor)
                output = guest.act(self.module, self.query, output)
        return output


def _without_values(path: str) -> PeftfxError:
    what = "the adapter's parameters have no values: it was added to a base on the meta device, or offloaded with one"
    hint = "fill the base and call reset_parameters(), or dispatch the base before you adapt it"
    return PeftfxError(what, path, hint)


def _only_tensor(path: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args[0]
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise other_call(path, f"it was called with {len(tensors)} tensors")
    return tensors[0]


def other_call(where: str, what: str) -> PeftfxError:
    """Return the error for a module that runs in another way than the graph says."""
    said = f"this module is not called as it was when the model was transformed: {what}"
    return PeftfxError(said, where, 'take the other road: peftfx.transform(..., road="graph")')
