"""CachePrefix: keys and values ahead of those in the cache that a view is given; its caller knows nothing of them.

The past that the model sees is `cat(prefix, past)`, its masks are wider and its positions further on by the prefix, and
what it hands back is without it. So one graph still serves prefill, continuations and single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.caches.held import Held, cache_names
from peftfx.views.decode import PAST, PRESENT
from peftfx.views.entry import POSITIONS, Entry, EntryCall, VirtualTokens

_MASK = "attention_mask"


@dataclass(frozen=True)
class CachePrefix(Entry):
    """A prefix bound inside a view with a cache.

    The hole is [tokens, the sum of what a token has in all layers]: a layer's keys and then its values, layer after
    layer, each with its heads one after another.

    Attributes:
        layers: what the cache holds.
        part: which of a layer's caches, where it has two.
    """

    layers: tuple[Held, ...]
    part: str = ""

    def check(self, inputs: Mapping[str, object]) -> None:
        """Nothing: it is no way into a forward."""

    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        shown = torch.ones(1, hole.shape[0], dtype=torch.bool, device=hole.device)
        return self.bind(call, base, hole[None], shown, hole.shape[0], dict(arguments))

    def bind(
        self,
        call: EntryCall,
        base: nn.Module,
        tables: Tensor,
        shown: Tensor,
        count: int | Tensor,
        given: dict[str, object],
    ) -> object:
        """Call the base behind prefixes.

        Args:
            call: how.
            base: what.
            tables: [rows, tokens, width]; one row serves all.
            shown: [rows, tokens], which of them there are.
            count: how many each row has.
            given: the arguments.
        """
        length = tables.shape[1]
        mask, positions = given.get(_MASK), given.get(POSITIONS)
        if isinstance(mask, Tensor):
            given[_MASK] = torch.cat([shown.to(mask.dtype).expand(mask.shape[0], -1), mask], dim=1)
        if isinstance(positions, Tensor):
            given[POSITIONS] = positions + count
        for name, rows in zip(self._names(PAST), self.split(tables), strict=True):
            past = given[name]
            assert isinstance(past, Tensor)
            given[name] = torch.cat([rows.expand(past.shape[0], -1, -1, -1).to(past.dtype), past], dim=2)
        output = call(base, given)
        assert isinstance(output, dict)
        return output | {name: output[name][:, :, length:] for name in self._names(PRESENT)}

    def split(self, tables: Tensor) -> Iterator[Tensor]:
        """Tables of a row for each token as keys and values, in turn for each layer, [rows, heads, tokens, width]."""
        widths = [(layer.heads, width) for layer in self.layers for width in (layer.key, layer.value)]
        parts = tables.split([heads * width for heads, width in widths], -1)
        for part, (heads, width) in zip(parts, widths, strict=True):
            yield part.unflatten(-1, (heads, width)).transpose(1, 2)

    def _names(self, kind: str) -> list[str]:
        return cache_names(kind, self.layers, self.part)


@dataclass(frozen=True)
class Prefilled(CachePrefix):
    """A prefix that virtual tokens leave in the cache: what a causal model computes for them depends on no text.

    Attributes:
        tokens: the virtual tokens, as an entry into the same view.
    """

    tokens: VirtualTokens | None = None

    name: ClassVar[str] = "prefilled"
