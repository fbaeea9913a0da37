"""WithRowAdapters: a view in which each row has the number of its adapter, and a soft prompt of its own.

Before a cache, prefixes of different lengths end at the same place: shorter prefixes are padded at the start, and the
mask hides the padding. Each row's positions count from its own prefix. Before an embedded text, virtual tokens start at
the same place, and padding is after the text. So each row gives the same results as alone, also in models that count
positions themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.processors.token_types import TYPES
from peftfx.caches.held import width_of
from peftfx.errors import PeftfxError
from peftfx.views.cache_prefix import CachePrefix
from peftfx.views.decode import Decode
from peftfx.views.encoder_decoder import Decoder, Encoder
from peftfx.views.entry import PER_TOKEN, POSITIONS, Entry, EntryCall, VirtualTokens
from peftfx.views.prefix import after_prefix
from peftfx.views.view import Axes, RunView

IDS = "adapter_ids"  #: the input: the number of each row's adapter, -1 for none
NAMES = "adapter_names"  #: HF PEFT's argument of a call, which has the name of each row's adapter
NO_ADAPTER = "__base__"  #: the name that stands for no adapter, as in HF PEFT
NOWHERE = 1 << 31  #: an index beyond every stack
PREFIXES, PROMPTS = "prefixes", "prompts"  #: the names of the holes
_MASK = "attention_mask"


@dataclass(frozen=True)
class CachePrefixByRow(CachePrefix):
    """Prefixes inside a view with a cache, one for each row.

    The hole is [adapters + 1, tokens, width]; the first entry is for no adapter.

    Attributes:
        lengths: the lengths of the prefixes, by entry.
    """

    lengths: tuple[int, ...] = ()

    name: ClassVar[str] = PREFIXES

    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        given = dict(arguments)
        ids = given.pop(IDS)
        assert isinstance(ids, Tensor)
        most, lengths = self.shape[1], _lengths(self.lengths, ids)
        shown = torch.arange(most, device=ids.device)[None] >= most - lengths
        types = given.get(TYPES)
        if isinstance(types, Tensor):
            given[TYPES] = after_prefix(types, most, self.plain)
        return self.bind(call, base, hole.index_select(0, entries(ids)), shown, lengths, given)


@dataclass(frozen=True)
class PromptsByRow(VirtualTokens):
    """Virtual tokens before a text, with a prompt of its own for each row: `[P; E(ids); padding]`.

    The hole is [adapters + 1, tokens, width]; the first entry is for no adapter, and the ends of shorter prompts are
    not used.

    Attributes:
        lengths: the lengths of the prompts, by entry.
        padding: the id of the padding after the text.
    """

    lengths: tuple[int, ...] = ()
    padding: int = 0

    name: ClassVar[str] = PROMPTS

    def check(self, inputs: Mapping[str, object]) -> None:
        super().check(inputs)
        where = next((n for n in (_MASK, self.tokens) if not isinstance(inputs.get(n), Tensor)), None)
        if where is not None:
            raise PeftfxError("soft prompts of different lengths need a text and its mask", where, f"pass {where}")
        if POSITIONS in inputs:
            what = "with soft prompts of different lengths, the model must count positions itself"
            raise PeftfxError(what, POSITIONS, "leave it out, or export each adapter merged")

    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        given = dict(arguments)
        ids = given.pop(IDS)
        assert isinstance(ids, Tensor)
        most, lengths = self.shape[1], _lengths(self.lengths, ids)
        laid = {self.tokens: (self.filler, self.padding), **{name: (one, 0) for name, one in PER_TOKEN.items()}}
        for name, (ahead, behind) in laid.items():
            value = given.get(name)
            if isinstance(value, Tensor) and value.ndim == 2 and name != "labels":
                own = value * (lengths == 0) if name in self.dropped else value  # dropped in rows with a prompt
                given[name] = lay(own, lengths, most, ahead, behind)
        rows = hole.index_select(0, entries(ids))

        def replaced(embedded: Tensor) -> Tensor:
            own = torch.arange(most, device=ids.device)[None, :, None] < lengths[..., None]
            first = torch.where(own, rows.to(embedded.dtype), embedded[:, :most])
            return torch.cat([first, embedded[:, most:]], dim=1)

        return self.call_replacing(call, base, replaced, given)


def lay(value: Tensor, lengths: Tensor, most: int, ahead: int, behind: int) -> Tensor:
    """Return each row as fill values for its prompt, its text, and padding to the longest prompt, [batch, all].

    Args:
        value: [batch, sequence].
        lengths: [batch, 1].
        most: the largest possible length.
        ahead, behind: the fill value of the prompt's places, and that of the padding.
    """
    rows, length = value.shape
    parts = value.new_full((rows, most), ahead), value, value.new_full((rows, 1), behind)
    place = torch.arange(most + length, device=value.device)[None]
    index = torch.where(place < lengths, place, (place + most - lengths).clamp(max=most + length))
    return torch.cat(parts, dim=1).gather(1, index)


def entries(ids: Tensor) -> Tensor:
    """Return the entry of each row. The first entry is for no adapter; numbers below -1 give an impossible entry.

    ONNX counts a negative index from the end, so -2 would select the last adapter. An impossible entry makes the read
    fail.
    """
    index = ids + 1
    return index.masked_fill(index < 0, NOWHERE)


def _lengths(lengths: Sequence[int], ids: Tensor) -> Tensor:
    """Return the length of each row's prompt, [batch, 1]."""
    return torch.tensor(lengths, device=ids.device).index_select(0, entries(ids))[:, None]


@dataclass(frozen=True)
class WithRowAdapters:
    """A view for generation with one more input, the number of each row's adapter.

    Attributes:
        view: the view without the input.
        lengths: the lengths of the adapters' soft prompts, after the length 0 for no adapter.
        entry: the entry that adds the soft prompts, if this view adds them.
    """

    view: Decode | Encoder | Decoder
    lengths: tuple[int, ...]
    entry: Entry | None = None
    name = "rowwise"

    @staticmethod
    def of(
        view: Decode | Encoder | Decoder, lengths: tuple[int, ...], prompts: PromptsByRow | None, plain: int = 0
    ) -> WithRowAdapters:
        """Return a view with adapters by row.

        Args:
            view: the view.
            lengths: the lengths of soft prompts.
            prompts: the entry that puts them before an embedded text.
            plain: the type of a token of plain text; see `CachePrefixByRow`.
        """
        if not any(lengths) or isinstance(view, Decoder):
            return WithRowAdapters(view, lengths)
        if isinstance(view, Encoder):
            return WithRowAdapters(view, lengths, prompts)
        held = view.layers
        shape = len(lengths), max(lengths), width_of(held)
        return WithRowAdapters(
            view, lengths, CachePrefixByRow(shape, held[0].dtype, held, lengths=lengths, plain=plain)
        )

    @property
    def _longer(self) -> Decode | Encoder | Decoder:
        """The view with the longest prompt before the encoded text."""
        if not isinstance(self.view, Decoder):
            return self.view
        return dataclasses.replace(self.view, layers=dataclasses.replace(self.view.layers, ahead=max(self.lengths)))

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        return {**self._longer.axes, IDS: ("batch",)}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs, in which each row has a random adapter or none."""
        made = self._longer.inputs(base, sizes=sizes, seed=seed)
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed + 1)
            rows = next(iter(made.values())).shape[0]  # the source may be sound or an image
            return made | {IDS: torch.randint(-1, len(self.lengths) - 1, (rows,), generator=random)}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with keys and values that the model computes without an adapter."""
        own = {name: value for name, value in inputs.items() if name != IDS}
        return {**inputs, **self._longer.with_past(base, own, run, seed)}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view. The entry adds the soft prompts inside the view."""
        given = dict(inputs)
        ids, mask = given.pop(IDS, None), given.get("encoder_attention_mask")
        if isinstance(mask, Tensor) and isinstance(ids, Tensor):
            given["encoder_attention_mask"] = self._encoded(mask, ids)
        return self.view(base, given)

    def _encoded(self, mask: Tensor, ids: Tensor) -> Tensor:
        """Return the mask of the encoded source, given the mask of the text."""
        return lay(mask, _lengths(self.lengths, ids), max(self.lengths), 1, 0) if any(self.lengths) else mask

    def alone(self, inputs: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return the inputs of the plain view in which all rows have the adapter `number`."""
        given = {name: value for name, value in inputs.items() if name != IDS}
        if isinstance(self.view, Decoder) and self.view.layers.masked:
            kept = given["encoder_attention_mask"].shape[1] + self.lengths[number + 1]
            own = (name for name in given if ".encoder." in name)
            given |= {name: given[name][:, :, :kept] for name in own}
        return given

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return an output's values where the mask shows something."""
        if not isinstance(self.view, Encoder) or not self.view.layers.masked:
            return self.view.shown(name, inputs, value)
        mask = self._encoded(inputs[_MASK], inputs[IDS])
        return self.view.shown(name, {**inputs, _MASK: mask}, value)

    @property
    def trials(self) -> Sequence[Mapping[str, int]]:
        """The sizes of the view's trials."""
        return self.view.trials
