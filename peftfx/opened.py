"""Opened: a view of a model with a place for a prefix among its inputs, keys and values of any number of tokens.

A soft prompt of any kind is one there: `peftfx/ahead.py` binds it, invisible to the caller, and prompts of embeddings
become what they leave in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.ahead import Ahead
from peftfx.decode import Decode
from peftfx.slots import AHEAD, PREFIX, Slot
from peftfx.views import Axes
from peftfx.within import width_of


@dataclass(frozen=True)
class Opened:
    """A decode view that takes a prefix, a row for each token of it.

    Attributes:
        view: without.
    """

    view: Decode
    name = "swappable"

    @property
    def ahead(self) -> Ahead:
        """What binds a prefix; how long it is, the prefix says."""
        return Ahead((0, width_of(self.view.layers)), self.view.layers[0].dtype, self.view.layers)

    @property
    def slot(self) -> Slot:
        """The place."""
        entry = self.ahead
        return Slot(PREFIX, PREFIX, "", (AHEAD, entry.shape[1]), str(entry.dtype).removeprefix("torch."))

    @property
    def axes(self) -> Axes:
        """The name of each input's axes."""
        return {**self.view.axes, PREFIX: (AHEAD, None)}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Valid inputs, behind a random prefix of the size named so."""
        wanted = {AHEAD: 3, **(sizes or {})}
        made = self.view.inputs(base, sizes=wanted, seed=seed)
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed + 1)
            shape = wanted[AHEAD], self.ahead.shape[1]
            return made | {PREFIX: torch.randn(shape, generator=random).to(self.ahead.dtype)}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        given = dict(inputs)
        prefix = given.pop(PREFIX)
        assert isinstance(prefix, Tensor)
        output = self.ahead(self.view, base, prefix, given)
        assert isinstance(output, dict)
        return output

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """What an output has where the mask shows something."""
        return self.view.shown(name, inputs, value)

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Those of the view, with a prefix and without."""
        return tuple({**sizes, AHEAD: size} for sizes, size in zip(self.view.trials, (0, 4, 1, 5, 0), strict=False))
