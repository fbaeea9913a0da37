"""WithPromptInputs: a view of a model with places for soft prompts among its inputs, for any number of virtual tokens.

A place is the hole of an entry that the caller fills. With no rows in it the view is the one without. A soft prompt of
any kind is a prefix in a decode view: prompts of embeddings are there what they leave in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.caches.held import width_of
from peftfx.graph.slots import PREFIX, SLOT_PROMPT, Slot
from peftfx.views.cache_prefix import CachePrefix
from peftfx.views.decode import Decode
from peftfx.views.encoder_decoder import Decoder, Encoder
from peftfx.views.entry import Entry, EntryCall
from peftfx.views.prompt_in_view import prompt_in_view
from peftfx.views.view import Axes, RunView


@dataclass(frozen=True)
class Place:
    """An input in the place of an entry's hole.

    Attributes:
        what: `SLOT_PROMPT` or `PREFIX`; the input's name, and that of its first axis.
        entry: what is done with it; its hole has as many rows as an example has.
        dropped: arguments that a soft prompt makes as if they were not given, here zero.
    """

    what: str
    entry: Entry
    dropped: frozenset[str] = frozenset()

    @property
    def slot(self) -> Slot:
        """The same as a slot."""
        return Slot(self.what, self.what, "", (self.what, self.entry.shape[1]), str(self.entry.dtype)[6:])

    def rows(self, count: int, seed: int) -> Tensor:
        """Random values of so many virtual tokens."""
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            return torch.randn(count, self.entry.shape[1], generator=random).to(self.entry.dtype)


def through(places: Sequence[Place], call: EntryCall) -> EntryCall:
    """A call that takes what these places hold among its arguments."""

    def run(base: nn.Module, arguments: Mapping[str, object]) -> object:
        given, entered = dict(arguments), call
        for place in places:
            entered = functools.partial(_enter, place, given.pop(place.what), entered)
        return entered(base, given)

    return run


def _enter(place: Place, hole: object, call: EntryCall, base: nn.Module, arguments: Mapping[str, object]) -> object:
    assert isinstance(hole, Tensor)
    given = dict(arguments)
    for name in place.dropped & given.keys():
        none = torch.arange(hole.shape[0] + 1, device=hole.device)[-1:] == 0
        given[name] = given[name] * none  # type: ignore[operator]
    return place.entry(call, base, hole, given)


@dataclass(frozen=True)
class WithPromptInputs:
    """A view that generates, with places.

    Attributes:
        view: without them.
        places: of it.
    """

    view: Decode | Encoder | Decoder
    places: tuple[Place, ...]
    name = "swappable"

    @staticmethod
    def of(view: Decode | Encoder | Decoder, places: Sequence[Place]) -> WithPromptInputs:
        """A view, given the places of the model's forward."""
        if isinstance(view, Decode) and not all(layer.attends for layer in view.layers):
            return WithPromptInputs(view, ())
        if isinstance(view, Decode):  # whose layers may differ, where HF PEFT's prefixes have those of a forward alike
            return WithPromptInputs(
                view, (Place(PREFIX, CachePrefix((3, width_of(view.layers)), view.layers[0].dtype, view.layers)),)
            )
        kept = []
        for place in places:
            view, entry = prompt_in_view(view, place.entry)  # type: ignore[assignment]
            kept += [] if entry is None else [Place(place.what, entry)]
        return WithPromptInputs(view, tuple(kept))

    @property
    def axes(self) -> Axes:
        """The name of each input's axes."""
        return {**self.view.axes, **{place.what: (place.what, None) for place in self.places}}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Valid inputs, with random rows, as many as the size named like a place says."""
        made = self.view.inputs(base, sizes=sizes, seed=seed)
        counts = {place.what: place.entry.shape[0] for place in self.places} | dict(sizes or {})
        return made | {place.what: place.rows(counts[place.what], seed + 1) for place in self.places}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """The same inputs, with keys and values that the model makes without a soft prompt."""
        names = {place.what for place in self.places}
        own = {name: value for name, value in inputs.items() if name not in names}
        return {**inputs, **self.view.with_past(base, own, run, seed)}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        output = through(self.places, self.view)(base, inputs)
        assert isinstance(output, dict)
        return output

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """What an output has where the mask shows something."""
        return self.view.shown(name, inputs, value)

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Those of the view, with soft prompts and without."""
        return tuple(_with_counts(self.view.trials))


def _with_counts(trials: Sequence[Mapping[str, int]]) -> Iterator[Mapping[str, int]]:
    for sizes, prefix, prompt in zip(trials, (0, 4, 1, 5, 0), (0, 2, 5, 0, 1), strict=False):
        yield {**sizes, PREFIX: prefix, SLOT_PROMPT: prompt}
