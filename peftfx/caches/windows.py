"""Windows of caches: layers whose own cache forgets tokens, although the model's mask would show them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, masking_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peftfx.graph.capturing.trace_lock import TRACING


class WindowLayer(DynamicLayer):
    """A cache layer that keeps the keys and values of all tokens, and gives a call only those in its window.

    As transformers' `DynamicSlidingWindowLayer`, which forgets all other tokens, it gives `window - 1` tokens of the
    past and all tokens of the call. If the model's mask hides the tokens outside the window, this layer is not needed.

    Args:
        window: how many tokens a token attends to, including itself.
    """

    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def _forgotten(self) -> int:
        return cast("int", torch.sym_max(self.get_seq_length() - self.window + 1, 0))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, [batch, heads, tokens, width], and return those in the window."""
        start = self._forgotten()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, start:], values[:, :, start:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask covers, and how many tokens come before these."""
        start = self._forgotten()
        return self.get_seq_length() - start + query_length, start


@contextmanager
def noting_windows(base: nn.Module) -> Iterator[list[int | None]]:
    """Yield a list that gets, after the context, the window of each cache layer that the model's mask ignores.

    Inside the context, run the model once. If its code makes masks that slide, the list stays empty.
    """
    found: list[int | None] = []
    before = {name: getattr(masking_utils, name) for name in _OVERLAYS}
    slides = False

    def noting(name: str, *args: object) -> object:
        nonlocal slides
        slides = True
        return before[name](*args)

    with TRACING:  # only one thread at a time replaces functions
        for name in _OVERLAYS:
            setattr(masking_utils, name, functools.partial(noting, name))
        try:
            yield found
        finally:
            for name, function in before.items():
                setattr(masking_utils, name, function)
    config = getattr(base, "config", None)
    if not slides and isinstance(config, PreTrainedConfig):
        own = DynamicCache(config=config.get_text_config(decoder=True)).layers
        found += [layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in own]


#: The functions of transformers that make masks which hide distant tokens.
_OVERLAYS = ("sliding_window_overlay", "chunked_overlay")
