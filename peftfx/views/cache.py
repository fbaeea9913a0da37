"""Caches: transformers' key/value caches to plain tensors and back, and which kinds of them are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from peftfx.errors import PeftfxError, first_line


@dataclass(frozen=True)
class Held:
    """What one layer of a cache holds for each token: `heads` keys of width `key`, and values of width `value`."""

    heads: int
    key: int
    value: int
    dtype: torch.dtype

    @staticmethod
    def of(key: Tensor, value: Tensor) -> Held:
        """What these tensors, [batch, heads, length, width], hold."""
        return Held(int(key.shape[1]), int(key.shape[-1]), int(value.shape[-1]), key.dtype)


def cache_of(tensors: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds keys and values, given in turn for each layer as [batch, heads, length, width].

    Every layer keeps all its tokens, also where the model's attention slides: there the model's mask does the sliding,
    so that what it computes is the same.
    """
    cache = DynamicCache()
    for key, value in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = key, value, True
        layer.device = key.device
        cache.layers.append(layer)
    return cache


def held(cache: Cache) -> list[Tensor]:
    """The keys and values of a cache, in turn for each layer.

    Raises:
        PeftfxError: a layer does not hold the keys and values of every token.
    """
    found: list[Tensor | None] = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            refuse(type(layer).__name__)
        found += layer.keys, layer.values
    return [tensor for tensor in found if tensor is not None]


def refuse_unknown(base: nn.Module) -> None:
    """Refuse a model whose own cache is more than keys and values: state spaces, convolutions, indexers."""
    config = getattr(base, "config", None)
    get = getattr(config, "get_text_config", None)
    text = None if get is None else get(decoder=True)
    try:
        layers = DynamicCache(config=text).layers if text is not None else []
    except Exception as error:
        what = f"the model's cache cannot be told from its config: {first_line(error)}"
        raise PeftfxError(what, type(base).__name__, "use the forward view") from error
    known = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # the last holds nothing: it reads another layer's
    other = next((layer for layer in layers if type(layer) not in known), None)
    if other is not None:
        refuse(type(other).__name__)


def refuse(kind: str) -> NoReturn:
    """Refuse a kind of cache layer, by its name."""
    what = f"a cache of {kind} is not the keys and values of every token, which is all that the decode view carries"
    raise PeftfxError(what, kind, "use transformers' DynamicCache, or the forward view")


def fill_cache(cache: Cache, tensors: Sequence[Tensor]) -> None:
    """Put keys and values, in turn for each layer, in the place of what a cache holds."""
    filled = cache_of(tensors)
    if cache.layers:
        for layer, new in zip(cache.layers, filled.layers, strict=True):
            vars(layer).update(vars(new))
    else:
        cache.layers.extend(filled.layers)
