"""The class `ModulesRoad`: puts the adapters of one model into its base's modules, calls these, and takes them out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.adapter_set import AdapterSet
from peftfx.bases.guests import GUESTS
from peftfx.contract.placement import SequencePlacement, owner_of
from peftfx.errors import PeftfxError
from peftfx.graph.capturing.trace_lock import TRACING
from peftfx.hosting.call import Keys, RowsByAdapter, acting
from peftfx.hosting.call_inputs import read_call_inputs
from peftfx.hosting.checkpointing import bind_checkpoints
from peftfx.hosting.guests import AttentionGuest, Hosted, PatternGuest, WeightGuest
from peftfx.hosting.host import dress, guests_of, undress
from peftfx.hosting.replaced import Copy, FoldedTensor
from peftfx.hosting.seats import AttentionSeat, CopySeat, FoldSeat, PatternSeat, Seat, Seating, TextSeat, WeightSeat
from peftfx.sharding.fsdp import settle, share_whole
from peftfx.views.entry import Entry
from peftfx.views.row_adapters import NO_ADAPTER

_NUMBERS = itertools.count()
GRAPH_ASKED = 'road="graph" was asked for'  #: the reason why an adapter has no seats in modules, by its user's wish


class ModulesRoad:
    """The adapters of one model, in the modules of its base.

    Attributes:
        seatings: the seating of each adapter, by name.
        prompts: the placement of each adapter that is a soft prompt, by name; soft prompts act before the modules.
        entries: the entry of each soft prompt in compiled calls, by name.
    """

    def __init__(self, base: nn.Module, adapters: AdapterSet) -> None:
        self.base, self.adapters = base, adapters
        self.number = next(_NUMBERS)
        self.seatings: dict[str, Seating] = {}
        self.prompts: dict[str, SequencePlacement] = {}
        self.entries: dict[str, Entry] = {}

    def enter(self, name: str, adapter: Adapter, seating: Seating) -> None:
        """Put an adapter into the modules where its seating says that it acts."""
        self.seatings[name] = seating
        for placement in adapter.placements.prompts:
            self.prompts[name] = placement
        for place in seating.seats:
            self._sit(name, adapter, place)
        bind_checkpoints(self.base)

    def leave(self, name: str) -> None:
        """Take an adapter out of the modules; a module without adapters gets its own class back."""
        seating = self.seatings.pop(name, Seating())
        self.prompts.pop(name, None)
        self.entries.pop(name, None)
        for path in dict.fromkeys(s.path for s in seating.seats):
            module = self.base.get_submodule(path)
            guests = module._modules.get(GUESTS)
            if not isinstance(guests, Hosted):
                continue
            if guests.drop(self.key(name)):
                dress(module)
            else:
                undress(module)

    def key(self, name: str) -> str:
        """Return an adapter's key in the modules, where adapters of other models may have the same name."""
        return f"{self.number}_{name}"

    def obstacle(self, names: Sequence[str], *, dearer: bool = True) -> str:
        """Return why these adapters do not act in the modules; empty if they do.

        Args:
            names: the adapters' names.
            dearer: whether it is a reason that a graph takes less memory.
        """
        for name in names:
            seating = self.seatings.get(name)
            if seating is None:
                return f"{name}: it has no seats"
            if reason := seating.obstacle or (seating.dearer if dearer else ""):
                return reason
        return ""

    def keys(self, names: Sequence[str]) -> Keys:
        """Return these adapters' keys in the modules, in order."""
        return tuple([self.key(name) for name in names])

    @contextmanager
    def acting(self, names: Sequence[str], given: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Let these adapters act in the modules, in this thread, until the `with` block ends; no thread traces then."""
        turn = nullcontext() if torch.compiler.is_compiling() else TRACING.running()
        with turn, acting(self.keys(names), given):
            yield

    def entry(self, names: Sequence[str]) -> Entry | None:
        """Return the entry that a soft prompt of these adapters takes, or None for the base's own forward."""
        name = next((name for name in names if name in self.prompts), None)
        if name is None:
            return None
        if torch.compiler.is_compiling():
            _find_entry(self, name)
            return self.entries[name]
        return self.prompts[name].method.entry(self.base, self.prompts[name].site)

    def run(
        self,
        names: Sequence[str],
        entry: Entry | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Tensor] | None = None,
        call: Callable[..., object] | None = None,
        virtual: Tensor | None = None,
    ) -> object:
        """Call the base with these adapters; with an `entry` of a soft prompt, `kwargs` has all arguments by name.

        Args:
            names: the adapters' names.
            entry: the entry that a soft prompt takes; None for the base's own forward.
            args, kwargs: the arguments.
            given: the inputs that methods read besides the model's own.
            call: what is called instead of the base, with its arguments; it runs the base's modules.
            virtual: what the soft prompt puts into its entry, if it is computed already.
        """
        called = self.base if call is None else call
        with self.within(names, given):
            if entry is None:
                return called(*args, **kwargs)
            entry.check(kwargs)
            hole = self.virtual(names, entry) if virtual is None else virtual
            return entry(lambda _, inner: called(**inner), self.base, hole, kwargs)

    @contextmanager
    def within(self, names: Sequence[str], given: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Let these adapters act in calls of the base, sharded or not, until the `with` block ends."""
        part = settle(self.base)
        if part is not None:
            share_whole((t for name in names for _, t in self.adapters[name].tensors()), part)
        with self.acting(names, given):
            yield

    def rows(self, names: Sequence[str]) -> RowsByAdapter:
        """Return the rows of a batch by adapter, given the adapter's name of each row; `__base__` is no adapter.

        Raises:
            PeftfxError: an adapter cannot act for some rows only, in the modules of the base.
        """
        for name in dict.fromkeys(names):
            reason = "" if name == NO_ADAPTER else self.obstacle((name,))
            if not reason and name in self.prompts:
                reason = "a soft prompt makes its rows longer than others"
            methods = () if reason or name == NO_ADAPTER else self.adapters[name].rules
            if any(method.invoked_by for method in methods):
                reason = "it acts behind an invocation in the text of all rows"
            if asked := [n for method in methods for n, count in method.inputs.items() if count > 1]:
                reason = f"it acts by {asked[0]}"
            if reason:
                hint = "call the model for the rows of each adapter by themselves"
                raise PeftfxError(f"this adapter cannot act for some rows alone: {reason}", name, hint)
        found: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            found.setdefault(name, []).append(row)
        keys = {name: () if name == NO_ADAPTER else self.keys((name,)) for name in found}
        return tuple((keys[name], torch.tensor(at)) for name, at in found.items())

    def virtual(self, names: Sequence[str], entry: Entry) -> Tensor:
        """Return the virtual tokens that a soft prompt puts into its entry."""
        name = next(name for name in names if name in self.prompts)
        placement = self.prompts[name]
        p = self.adapters[name].params(placement) | read_call_inputs(placement.method)
        return placement.method.virtual(p, self.base.training).to(entry.dtype)

    def _sit(self, name: str, adapter: Adapter, place: Seat) -> None:
        module, key = self.base.get_submodule(place.path), self.key(name)
        guests = guests_of(module)
        if isinstance(place, CopySeat):
            copies = guests.copies.setdefault(place.name, {})
            before = copies.get(key)
            copies[key] = Copy(place, adapter, before if isinstance(before, Copy) else None)
            guests.keep(key, owner_of(adapter, place.override.key)[0])
        elif isinstance(place, TextSeat):
            guests.texts[key] = place
        else:
            if isinstance(place, FoldSeat):
                folded = guests.copies.setdefault(place.name, {}).setdefault(key, FoldedTensor())
                assert isinstance(folded, FoldedTensor)
                folded.add(place, adapter)
            if isinstance(place, WeightSeat):
                guests.weights.setdefault(key, []).append(WeightGuest(place, adapter, module))
            if isinstance(place, PatternSeat):
                guests.matches.setdefault(key, []).append(PatternGuest(place, adapter))
            if isinstance(place, AttentionSeat):
                guests.attentions.setdefault(key, []).append(AttentionGuest(place, adapter, self.base))
            guests.keep(key, adapter.get_submodule(place.placement.key))
        dress(module, inner=isinstance(place, WeightSeat) and place.inner)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _find_entry(road: ModulesRoad, name: str) -> None:
    """Find the entry of a soft prompt for a compiled call, which cannot trace the search in the base and its config."""
    found = road.prompts[name].method.entry(road.base, road.prompts[name].site)
    if road.entries.get(name) != found:
        road.entries[name] = found
