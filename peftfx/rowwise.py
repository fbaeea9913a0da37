"""Rowwise: a view in which each row of a batch comes with the number of its adapter, and has a prefix of its own.

Prefixes of different lengths end together: shorter ones are padded ahead and the mask hides that, as it hides padding
of a text. Each row's positions count from its own prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.ahead import Ahead
from peftfx.decode import Decode
from peftfx.entry import Call
from peftfx.views import Axes

IDS = "adapter_ids"  #: the input: the number of each row's adapter, -1 for none
BATCHED = "peftfx_adapters.json"  #: beside the model: the adapters' names, in the order of their numbers
PREFIXES = "prefixes"  #: the hole that they fill


@dataclass(frozen=True)
class AheadByRow(Ahead):
    """Prefixes bound inside a view with a cache, of which each row takes one.

    The hole is [adapters + 1, tokens, width]; the first entry is of no adapter.

    Attributes:
        lengths: of the prefixes, by entry.
    """

    lengths: tuple[int, ...] = ()

    name: ClassVar[str] = PREFIXES

    def __call__(self, call: Call, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        given = dict(arguments)
        ids = given.pop(IDS)
        assert isinstance(ids, Tensor)
        index, most = ids + 1, self.shape[1]
        lengths = torch.tensor(self.lengths, device=ids.device).index_select(0, index)[:, None]
        shown = torch.arange(most, device=ids.device)[None] >= most - lengths
        return self.bind(call, base, hole.index_select(0, index), shown, lengths, given)


@dataclass(frozen=True)
class Rowwise:
    """A decode view with an input more, the number of each row's adapter.

    Attributes:
        view: without.
        lengths: of the adapters' prefixes, that of none first.
        width: of a token of a prefix.
    """

    view: Decode
    lengths: tuple[int, ...]
    name = "rowwise"

    @property
    def entry(self) -> AheadByRow | None:
        """What binds the prefixes, if there are any."""
        if not any(self.lengths):
            return None
        held = self.view.layers
        width = sum(layer.heads * (layer.key + layer.value) for layer in held)
        return AheadByRow((len(self.lengths), max(self.lengths), width), held[0].dtype, held, lengths=self.lengths)

    @property
    def axes(self) -> Axes:
        """The name of each input's axes."""
        return {**self.view.axes, IDS: ("batch",)}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Valid inputs, each row with a random adapter or none."""
        made = self.view.inputs(base, sizes=sizes, seed=seed)
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed + 1)
            rows = made["input_ids"].shape[0]
            return made | {IDS: torch.randint(-1, len(self.lengths) - 1, (rows,), generator=random)}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view; what is bound inside, the entry binds."""
        return self.view(base, {name: value for name, value in inputs.items() if name != IDS})

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """What an output has where the mask shows something."""
        return self.view.shown(name, inputs, value)

    @property
    def trials(self) -> Sequence[Mapping[str, int]]:
        """Those of the view."""
        return self.view.trials
