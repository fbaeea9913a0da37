"""Caches: converts transformers' caches to plain tensors and back, and refuses unknown kinds of caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
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
from peftfx.caches.states import StateAndAttentionLayer, StateCache, StateLayer
from peftfx.caches.windows import WindowLayer
from peftfx.errors import PeftfxError, first_line

_ATTENDING: tuple[type, ...] = (DynamicLayer, WindowLayer, DynamicIndexedLayer, StateAndAttentionLayer)
_STATES: tuple[type, ...] = (StateLayer, StateAndAttentionLayer)

#: For each kind of transformers' cache layers: a function of the number of states that makes an empty layer whose
#: tensors can be set and read. The layer for a sliding window keeps all tokens: the model's mask hides those outside
#: the window, so that the results are the same. If the mask does not, `WindowLayer` takes its place.
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
    """Return a cache that holds these tensors, in the order in which its layers keep them.

    Args:
        layers: what each layer of the cache keeps.
        tensors: the tensors of all layers.
        cache: a cache to fill, by default a new one. Its layer objects stay the same, so that references to them stay
            valid.
    """
    filled = StateCache() if cache is None else cache
    rest = iter(tensors)
    made = [_layer_of({kept.name: next(rest) for kept in layer.kept}, layer.window) for layer in layers]
    if filled.layers:
        for old, new in zip(filled.layers, made, strict=False):
            vars(old).update(vars(new))
    else:
        filled.layers.extend(made)  # type: ignore[arg-type]
    return filled


def _layer_of(given: Mapping[str, Tensor], window: int | None) -> object:
    """Return a cache layer that holds the given tensors, and shows those in its window."""
    states = {name: tensor for name, tensor in given.items() if name not in (KEY, VALUE, INDEXER)}
    if not given:
        unused = DummyLayer()
        unused.is_initialized = False  # code that asks is told that there are no keys to read
        return unused
    layer: DynamicLayer | StateLayer
    if states:
        count = 1 + max(int(tail) if (tail := name.rpartition("_")[2]).isdigit() else 0 for name in states)
        layer = StateAndAttentionLayer(count) if KEY in given else StateLayer(count)
        for name, tensor in states.items():
            layer.give(name, tensor)
    else:
        plain = DynamicLayer() if window is None else WindowLayer(window)
        layer = DynamicIndexedLayer() if INDEXER in given else plain
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
    """Return all tensors of a cache, layer after layer.

    Raises:
        PeftfxError: a layer's contents cannot be set and read as tensors.
    """
    found: list[Tensor] = []
    for layer in cache.layers:
        if type(layer) not in (*_ATTENDING, *_STATES, DummyLayer):
            refuse(type(layer).__name__)
        found += (tensor for _, tensor in _kept(layer))
    return found


def layers_in(cache: Cache, windows: Sequence[int | None] = ()) -> tuple[Held, ...]:
    """Return what each layer of a cache keeps, without the last layers if these keep nothing.

    Args:
        cache: the cache.
        windows: the window of each layer; see `Held`.
    """
    own = zip_longest(cache.layers, windows[: len(cache.layers)])
    layers = [Held(tuple(KeptTensor.of(*item) for item in _kept(layer)), window) for layer, window in own]
    while layers and not layers[-1].kept:
        layers.pop()
    return tuple(layers)


def empty_cache(base: nn.Module) -> DynamicCache:
    """Return an empty cache of the kind that a model's config asks for, whose layers take and give tensors.

    Raises:
        PeftfxError: the config does not tell the kind, or a layer is of an unknown kind.
    """
    config = getattr(base, "config", None)
    get = getattr(config, "get_text_config", None)
    text = None if get is None else get(decoder=True)
    try:
        own = DynamicCache(config=text).layers if text is not None else []
    except Exception as error:
        what = f"the model's config does not tell the kind of its cache: {first_line(error)}"
        raise PeftfxError(what, type(base).__name__, "use the forward view") from error
    other = next((layer for layer in own if type(layer) not in _EMPTY), None)
    if other is not None:
        refuse(type(other).__name__)
    cache = StateCache()
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in own):
        made = [_EMPTY[type(layer)](getattr(layer, "number_of_states", 1)) for layer in own]
        cache.layers.extend(made)  # type: ignore[arg-type]
    return cache  # only keys and values: a layer is made when the model's code first writes into it


def keeps_states(base: nn.Module) -> bool:
    """Say whether a layer of the cache that a model's config asks for keeps states."""
    try:
        return any(isinstance(layer, StateLayer) for layer in empty_cache(base).layers)
    except PeftfxError:  # a cache of an unknown kind
        return False


def refuse(kind: str) -> NoReturn:
    """Refuse a kind of cache layer, by its name."""
    what = f"the decode view cannot carry a cache of {kind}: it carries states, and the keys and values of every token"
    raise PeftfxError(what, kind, "use transformers' DynamicCache, or the forward view")
