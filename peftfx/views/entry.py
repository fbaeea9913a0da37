"""Entries: ways into a model for soft prompts. They change the call and no weight, so they are captured as other calls.

A view that is captured through an entry has a hole: a constant that the entry's code reads, and that a soft prompt
replaces (`passes/adaptation/insert.py`). Until then the hole is zero. `prompt_in_view.py` says which entry a view gets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.bases.embedded_text import EmbeddedText
from peftfx.errors import PeftfxError

EntryCall = Callable[[nn.Module, Mapping[str, object]], object]
"""A function that runs a module in a view: it takes the module and the view's keyword arguments, and returns
tensors."""

HOLE = "hole"  #: the constant's name in a graph's constants
#: Arguments with a value for each token, and their values for a virtual token. Positions are counted on instead.
#: A virtual token is of a text, also for models that tell those of images by `mm_token_type_ids`.
PER_TOKEN: Mapping[str, int] = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}
POSITIONS = "position_ids"
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  #: transformers' arguments that say where a row's texts begin


@dataclass(frozen=True)
class Entry(ABC):
    """A way to call the base with the arguments of one of its views, and one more tensor.

    Attributes:
        shape: the hole's shape.
        dtype: the hole's dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    name: ClassVar[str] = HOLE
    """The hole's name. A hole with a name other than `HOLE` is not filled by a method's own tensors."""

    def hole(self, base: nn.Module) -> Tensor:
        """Return the content of the hole before it is filled."""
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        return torch.zeros(self.shape, dtype=self.dtype, device=device)

    @abstractmethod
    def check(self, inputs: Mapping[str, object]) -> None:
        """Refuse `inputs` of a forward that cannot run through this entry. Their sizes are those of the example."""

    @abstractmethod
    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        """Return the result of `call` for the base and these arguments, with the content of the hole."""


def refuse_packed(inputs: Mapping[str, object]) -> None:
    """Refuse rows of several texts, as of padding-free training: a soft prompt is before the first text alone."""
    name = next((name for name in PACKED if inputs.get(name) is not None), None)
    positions = inputs.get(POSITIONS)
    if name is None and isinstance(positions, Tensor) and inputs.get("attention_mask") is None:
        known = not isinstance(positions, FakeTensor) and not torch.compiler.is_compiling()
        if known and positions.ndim == 2 and bool((positions.diff(dim=1) < 0).any()):
            name = POSITIONS
    if name is not None:
        what = "a row has several texts, and a soft prompt would be before the first of them alone"
        raise PeftfxError(what, name, "pad the texts, a row for each: of a trainer, padding_free=False, packing=False")


def forward(base: nn.Module, arguments: Mapping[str, object]) -> object:
    """Call the base's own forward."""
    return base(**arguments)


@dataclass(frozen=True)
class VirtualTokens(Entry):
    """Rows of embeddings before those of the text, `[P; E(ids)]`, with all arguments along the text extended.

    The model is called on its own ids, preceded by a filler id for each virtual token, and the hole's rows replace the
    first rows of the embedding. So the model's code still has ids to search for padding, as in classifiers that pool
    the last token, or positions counted from ids. With `inputs_embeds` there would be no ids.

    Attributes:
        embedding: the path of the module that embeds the text.
        tokens: the name of the argument that holds the ids.
        filler: an id without a special meaning for the model's code: neither padding nor the end of a text.
        dropped: arguments that HF PEFT does not pass on.
        labelled: whether `labels` have a value for each token of the text.
    """

    embedding: str
    tokens: str = "input_ids"
    filler: int = 0
    dropped: frozenset[str] = frozenset()
    labelled: bool = True

    @property
    def _grown(self) -> tuple[str, ...]:
        own = (name for name in PER_TOKEN if name not in self.dropped and (name != "labels" or self.labelled))
        return (*own, POSITIONS)

    def check(self, inputs: Mapping[str, object]) -> None:
        refuse_packed(inputs)
        text = inputs.get(self.tokens, inputs.get("inputs_embeds"))
        if not isinstance(text, Tensor):
            hint = f"pass {self.tokens} or inputs_embeds"
            raise PeftfxError("virtual tokens are put before a text, but the call has no text", ", ".join(inputs), hint)
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or name in (self.tokens, "inputs_embeds", *self.dropped):
                continue
            if name == POSITIONS and value.ndim == 3 and value.shape[1:] == text.shape[:2]:
                continue  # several for each token
            if name in self._grown and name != "labels" and value.ndim != 2:
                what = f"virtual tokens cannot be added to a {name} of {value.ndim} axes"
                raise PeftfxError(what, name, "pass it as [batch, sequence]")
            along = value.ndim > 1 and value.shape[:2] == text.shape[:2] and not name.startswith("decoder_")
            if along and name not in (*self._grown, "labels"):
                what = f"{name} has one value for each token, but no value for the virtual tokens"
                raise PeftfxError(what, name, "leave it out, or use a method that acts on weights")

    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        given = {name: value for name, value in arguments.items() if name not in self.dropped}
        count = hole.shape[-2]  # a symbol, if the hole is an input
        for name in self._grown:
            value = given.get(name)
            if isinstance(value, Tensor) and value.ndim > 1 and not value.is_floating_point():
                given[name] = _widened(name, value, count)
        embeds, ids = given.get("inputs_embeds"), given.get(self.tokens)
        if isinstance(embeds, Tensor):
            given["inputs_embeds"] = _embedded(hole, embeds)
            return call(base, given)
        assert isinstance(ids, Tensor)
        given[self.tokens] = _ahead(ids, ids.new_full((count,), self.filler))
        return self.call_replacing(call, base, lambda embedded: _embedded(hole, embedded), given, left_out=count)

    def call_replacing(
        self,
        call: EntryCall,
        base: nn.Module,
        replaced: Callable[[Tensor], Tensor],
        given: Mapping[str, object],
        *,
        left_out: int = 0,
    ) -> object:
        """Call the base with a replacement of the first output of its embedding, which is the text.

        Code that embeds the text again, to write sounds into it, gets the replacement again.

        The embedding does not get the first `left_out` ids of each row. So hooks of others at the embedding, such as
        those that add noise, see what they see in HF PEFT: the text alone.
        """
        ids = given.get(self.tokens)
        text = EmbeddedText(self.embedding, ids if isinstance(ids, Tensor) else None, replaced, left_out)
        with text.within(base):
            return call(base, given)


def _embedded(hole: Tensor, embeds: Tensor) -> Tensor:
    return torch.cat([hole.to(embeds.dtype).expand(embeds.shape[0], -1, -1), embeds], dim=1)


def _widened(name: str, value: Tensor, count: int) -> Tensor:
    if name != POSITIONS:
        return _ahead(value, value.new_full((count,), PER_TOKEN[name]))
    first = value.amin(dim=-1, keepdim=True)  # a model's positions need not start at 0
    return torch.cat([first + torch.arange(count, device=value.device), value + count], dim=-1)


def _ahead(value: Tensor, new: Tensor) -> Tensor:
    """Return `value` with the row `new` before each of its rows."""
    return torch.cat([new.expand(value.shape[0], -1), value], dim=1)
