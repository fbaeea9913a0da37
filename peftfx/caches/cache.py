"""Caches: transformers' caches to plain tensors and back, and which kinds of them are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from peftfx.caches.held import INDEXER, KEY, VALUE, Held, KeptTensor
from peftfx.caches.states import StateAndAttentionLayer, StateLayer
from peftfx.errors import PeftfxError, first_line

_ATTENDING: tuple[type, ...] = (DynamicLayer, DynamicIndexedLayer, StateAndAttentionLayer)
_STATES: tuple[type, ...] = (StateLayer, StateAndAttentionLayer)

#: Of each kind of transformers' layers, an empty one that hands tensors in and out, given how many states it has. One
#: that slides keeps all its tokens here: the model's mask does the sliding, so that what it computes is the same.
_EMPTY: Mapping[type, Callable[[int], object]] = {
    DynamicLayer: lambda _: DynamicLayer(),
    DynamicSlidingWindowLayer: lambda _: DynamicLayer(),
    DynamicIndexedLayer: lambda _: DynamicIndexedLayer(),
    DummyLayer: lambda _: DummyLayer(),
    LinearAttentionLayer: StateLayer,
    LinearAttentionAndFullAttentionLayer: StateAndAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: StateAndAttentionLayer,
}


def cache_of(layers: Sequence[Held], tensors: Sequence[Tensor], cache: DynamicCache | None = None) -> DynamicCache:
    """A cache that holds these tensors, in the order of what the layers keep.

    Args:
        layers: what each of its layers keeps.
        tensors: of all layers.
        cache: one to be filled, by default a new one. Whoever knows its layers goes on knowing them.
    """
    filled = DynamicCache() if cache is None else cache
    rest = iter(tensors)
    made = [_layer_of({kept.name: next(rest) for kept in layer.kept}) for layer in layers]
    if filled.layers:
        for old, new in zip(filled.layers, made, strict=False):
            vars(old).update(vars(new))
    else:
        filled.layers.extend(made)  # type: ignore[arg-type]
    return filled


def _layer_of(given: Mapping[str, Tensor]) -> object:
    """A layer that keeps these."""
    states = {name: tensor for name, tensor in given.items() if name not in (KEY, VALUE, INDEXER)}
    if not given:
        return DummyLayer()
    layer: DynamicLayer | StateLayer
    if states:
        count = 1 + max(int(tail) if (tail := name.rpartition("_")[2]).isdigit() else 0 for name in states)
        layer = StateAndAttentionLayer(count) if KEY in given else StateLayer(count)
        for name, tensor in states.items():
            layer.give(name, tensor)
    else:
        layer = DynamicIndexedLayer() if INDEXER in given else DynamicLayer()
    if isinstance(layer, DynamicLayer):
        layer.keys, layer.values, layer.is_initialized = given[KEY], given[VALUE], True
        layer.dtype, layer.device = given[KEY].dtype, given[KEY].device  # type: ignore[attr-defined]
    if isinstance(layer, DynamicIndexedLayer):
        layer.indexer_keys, layer.is_indexer_initialized = given[INDEXER], True
        layer.indexer_dtype, layer.indexer_device = given[INDEXER].dtype, given[INDEXER].device
    return layer


def _kept(layer: object) -> Iterator[tuple[str, Tensor]]:
    if type(layer) in _ATTENDING and layer.keys is not None:  # type: ignore[attr-defined]
        yield KEY, layer.keys  # type: ignore[attr-defined]
        yield VALUE, layer.values  # type: ignore[attr-defined]
    if isinstance(layer, DynamicIndexedLayer):
        if layer.indexer_position_ids is not None:
            refuse("the positions of an indexer's keys")
        if layer.indexer_keys is not None:
            yield INDEXER, layer.indexer_keys
    if isinstance(layer, StateLayer):
        for name in layer.states:
            state = getattr(layer, name)
            if state is not None:
                yield name, state


def held(cache: Cache) -> list[Tensor]:
    """All tensors of a cache, layer after layer.

    Raises:
        PeftfxError: a layer does not hold what is handed in and out as tensors.
    """
    found: list[Tensor] = []
    for layer in cache.layers:
        if type(layer) not in (*_ATTENDING, *_STATES, DummyLayer):
            refuse(type(layer).__name__)
        found += (tensor for _, tensor in _kept(layer))
    return found


def layers_in(cache: Cache) -> tuple[Held, ...]:
    """What the layers of a cache keep, up to the last that keeps something."""
    layers = [Held(tuple(KeptTensor.of(name, tensor) for name, tensor in _kept(layer))) for layer in cache.layers]
    while layers and not layers[-1].kept:
        layers.pop()
    return tuple(layers)


def empty_cache(base: nn.Module) -> DynamicCache:
    """An empty cache of the kind that a model's config asks for, whose layers hand tensors in and out.

    Raises:
        PeftfxError: it cannot be told, or a layer is of a kind that is not known.
    """
    config = getattr(base, "config", None)
    get = getattr(config, "get_text_config", None)
    text = None if get is None else get(decoder=True)
    try:
        own = DynamicCache(config=text).layers if text is not None else []
    except Exception as error:
        what = f"the model's cache cannot be told from its config: {first_line(error)}"
        raise PeftfxError(what, type(base).__name__, "use the forward view") from error
    other = next((layer for layer in own if type(layer) not in _EMPTY), None)
    if other is not None:
        refuse(type(other).__name__)
    cache = DynamicCache()
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in own):
        made = [_EMPTY[type(layer)](getattr(layer, "number_of_states", 1)) for layer in own]
        cache.layers.extend(made)  # type: ignore[arg-type]
    return cache  # of keys and values alone: a layer comes when the model's code first writes into it


def refuse(kind: str) -> NoReturn:
    """Refuse a kind of cache layer, by its name."""
    what = (
        f"a cache of {kind} cannot be carried by the decode view, which carries the keys and values of "
        "every token, and states"
    )
    raise PeftfxError(what, kind, "use transformers' DynamicCache, or the forward view")
