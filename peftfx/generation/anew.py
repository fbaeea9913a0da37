"""Caches that a model's class computes anew while it generates.

Some classes use other rotary embeddings where a text has grown beyond a length of the config. Their
`prepare_inputs_for_generation` then drops the cache, and the whole text is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig

from peftfx.errors import raise_if_memory_is_out

_PREPARES = "prepare_inputs_for_generation"
_LONGEST = 1 << 21  #: tokens; numbers of a config that are larger are no lengths that are tried


class OwnPreparation:
    """What a model's class does to a cache before each step of its `generate`."""

    def __init__(self, kind: Any, config: PreTrainedConfig) -> None:
        """Make an object of the class without modules or weights: the preparation reads the config alone."""
        self._model = kind.__new__(kind)
        nn.Module.__init__(self._model)
        self._model.none = nn.Parameter(torch.empty(0, device="meta"))  # transformers asks on which device it is
        self._model.config, self._model.generation_config = config, GenerationConfig.from_model_config(config)
        self.differs = getattr(kind, _PREPARES, None) not in (None, getattr(GenerationMixin, _PREPARES))
        if self.drops_at(2):  # a class that never takes such a cache says nothing of lengths
            self.differs = False

    def drops(self, input_ids: Tensor, cache: Cache, **options: Any) -> bool:
        """Return whether the class leaves a cache with tokens unused for a text that goes on from it."""
        if not self.differs:
            return False
        try:
            made = getattr(self._model, _PREPARES)(input_ids, cache=cache, **options)
        except Exception as error:  # code that reads a module, which this object has not
            raise_if_memory_is_out(error)
            return False
        return made.get("cache") is None

    def drops_at(self, length: int) -> bool:
        """Return whether the class leaves a cache of so many tokens unused for the next token."""
        tokens, mask = torch.zeros(1, length + 1, dtype=torch.long), torch.ones(1, length + 1, dtype=torch.long)
        return self.drops(tokens, _Counted(length), attention_mask=mask, use_cache=True, next_sequence_length=1)


def computed_anew_beyond(base: nn.Module) -> int | None:
    """Return the number of tokens beyond which a model's class computes the cache anew, or None if it never does."""
    config = getattr(base, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    own = OwnPreparation(type(base), config)
    if not own.differs:
        return None
    numbers = {value for value in vars(config).values() if type(value) is int and 2 < value <= _LONGEST}
    return next((number for number in sorted(numbers) if own.drops_at(number)), None)


class _Counted(DynamicCache):
    """A cache that only says how many tokens it has."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __len__(self) -> int:
        return 1  # layer; a cache without layers counts as none

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length
