"""WithPromptInputs: a view with soft prompts as inputs, of any number of virtual tokens.

A place is the hole of an entry that the caller fills. If the place has 0 rows, the view works as without a soft
prompt. In a decode view every soft prompt is a prefix: for virtual tokens, the keys and values that they leave in the
cache.
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
from peftfx.views.entry import Entry, EntryCall, VirtualTokens
from peftfx.views.prompt_in_view import prompt_in_view
from peftfx.views.view import Axes, RunView


@dataclass(frozen=True)
class Place:
    """An input that replaces an entry's hole.

    Attributes:
        what: `SLOT_PROMPT` or `PREFIX`: the name of the input, and of its first axis.
        entry: the entry that uses the input; its hole has as many rows as an example.
        dropped: arguments that have no effect under a soft prompt; they are set to zero.
    """

    what: str
    entry: Entry
    dropped: frozenset[str] = frozenset()

    @property
    def slot(self) -> Slot:
        """This place as a slot."""
        return Slot(self.what, self.what, "", (self.what, self.entry.shape[1]), str(self.entry.dtype)[6:])

    def rows(self, count: int, seed: int) -> Tensor:
        """Return random values of `count` virtual tokens."""
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            return torch.randn(count, self.entry.shape[1], generator=random).to(self.entry.dtype)


def through(places: Sequence[Place], call: EntryCall) -> EntryCall:
    """Return a call that takes the contents of these places among its arguments."""

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
    """A view for generation, with places for soft prompts.

    Attributes:
        view: the view without places.
        places: the places of the view.
    """

    view: Decode | Encoder | Decoder
    places: tuple[Place, ...]
    name = "swappable"

    @staticmethod
    def of(view: Decode | Encoder | Decoder, places: Sequence[Place]) -> WithPromptInputs:
        """Return a view with places, given the places of the model's forward."""
        if isinstance(view, Decode) and not all(layer.attends for layer in view.layers):
            return WithPromptInputs(view, ())
        if isinstance(view, Decode):  # its layers may differ in shape; HF PEFT's prefixes have one shape
            shape, plain = (3, width_of(view.layers)), max((getattr(p.entry, "plain", 0) for p in places), default=0)
            ahead = CachePrefix(shape, view.layers[0].dtype, view.layers, plain=plain)
            return WithPromptInputs(view, (Place(PREFIX, ahead),))
        kept = []
        for place in places:
            if isinstance(place.entry, VirtualTokens) and not view.layers.masked:
                continue  # sound or an image is encoded, and virtual tokens are put before a text
            view, entry = prompt_in_view(view, place.entry)  # type: ignore[assignment]
            kept += [] if entry is None else [Place(place.what, entry)]
        return WithPromptInputs(view, tuple(kept))

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        return {**self.view.axes, **{place.what: (place.what, None) for place in self.places}}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs with random rows, as many as the size with the place's name says."""
        made = self.view.inputs(base, sizes=sizes, seed=seed)
        counts = {place.what: place.entry.shape[0] for place in self.places} | dict(sizes or {})
        return made | {place.what: place.rows(counts[place.what], seed + 1) for place in self.places}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with keys and values that the model computes without a soft prompt."""
        names = {place.what for place in self.places}
        own = {name: value for name, value in inputs.items() if name not in names}
        return {**inputs, **self.view.with_past(base, own, run, seed)}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        output = through(self.places, self.view)(base, inputs)
        assert isinstance(output, dict)
        return output

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return an output's values where the mask shows something."""
        return self.view.shown(name, inputs, value)

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """The sizes of the view's trials, with and without soft prompts."""
        return tuple(_with_counts(self.view.trials))


def _with_counts(trials: Sequence[Mapping[str, int]]) -> Iterator[Mapping[str, int]]:
    for sizes, prefix, prompt in zip(trials, (0, 4, 1, 5, 0), (0, 2, 5, 0, 1), strict=False):
        yield {**sizes, PREFIX: prefix, SLOT_PROMPT: prompt}
