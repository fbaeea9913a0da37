"""CachePrefix: keys and values before those in a view's cache, which the caller of the view does not see.

The model's past is `cat(prefix, past)`. Its masks and positions are extended by the prefix, and the returned cache is
without the prefix. So one graph still serves prefill, continuations and single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.bases.processors.token_types import TYPES
from peftfx.caches.held import Held, cache_names
from peftfx.views.decode import PAST, PRESENT
from peftfx.views.entry import POSITIONS, Entry, EntryCall, VirtualTokens
from peftfx.views.prefix import after_prefix

_MASK = "attention_mask"


@dataclass(frozen=True)
class CachePrefix(Entry):
    """A prefix that is added inside a view with a cache.

    The hole is [tokens, width of a token in all layers]: for each layer the keys and then the values, head by head.

    Attributes:
        layers: what each layer of the cache holds.
        part: which of a layer's two caches, if there are two.
        plain: the type of a token that sees no token behind it, if the model's attention depends on types.
    """

    layers: tuple[Held, ...]
    part: str = ""
    plain: int = 0

    def check(self, inputs: Mapping[str, object]) -> None:
        """Do nothing: a cache prefix never enters a forward."""

    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        given, count = dict(arguments), hole.shape[0]
        if isinstance(types := given.get(TYPES), Tensor):
            given[TYPES] = after_prefix(types, count, self.plain)
        shown = torch.ones(1, count, dtype=torch.bool, device=hole.device)
        return self.bind(call, base, hole[None], shown, count, given)

    def bind(
        self,
        call: EntryCall,
        base: nn.Module,
        tables: Tensor,
        shown: Tensor,
        count: int | Tensor,
        given: dict[str, object],
    ) -> object:
        """Call the base with prefixes before its past.

        Args:
            call: runs the view.
            base: the model.
            tables: [rows, tokens, width]; a single row serves all rows of the batch.
            shown: [rows, tokens], which tokens of the tables exist.
            count: how many tokens each row has.
            given: the arguments of the view.
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
        """Yield each layer's keys and then its values, [rows, heads, tokens, width], from `tables`."""
        widths = [(layer.heads, width) for layer in self.layers for width in (layer.key, layer.value)]
        parts = tables.split([heads * width for heads, width in widths], -1)
        for part, (heads, width) in zip(parts, widths, strict=True):
            yield part.unflatten(-1, (heads, width)).transpose(1, 2)

    def _names(self, kind: str) -> list[str]:
        return cache_names(kind, self.layers, self.part)


@dataclass(frozen=True)
class Prefilled(CachePrefix):
    """The prefix that virtual tokens leave in the cache. In a causal model the prefix does not depend on the text.

    Attributes:
        tokens: the virtual tokens, as an entry of the same view.
    """

    tokens: VirtualTokens | None = None

    name: ClassVar[str] = "prefilled"
