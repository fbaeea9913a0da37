"""Prefix: keys and values before those of the text, given to the model as a cache that holds them already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.guests import own_modules
from peftfx.caches.cache import keeps_states
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.twins.offloaded import fetched
from peftfx.twins.twin import copied
from peftfx.views.dry_run import fake_run
from peftfx.views.entry import POSITIONS, Entry, EntryCall, refuse_packed

if TYPE_CHECKING:
    from transformers.cache_utils import Cache, DynamicCache

_CACHE = "cache"  #: transformers' name of the argument
_TEXT = frozenset({"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"})


@dataclass(frozen=True)
class Prefix(Entry):
    """The keys and values of virtual tokens in every layer, as a cache that holds them already.

    The hole is [tokens, 2 * layers * heads * head features]: for each layer the keys and then the values. Queries
    attend to the prefix as the model's code lets them attend to a cache. Masks get ones for the prefix, positions count
    on after it, and outputs are not longer.

    Attributes:
        heads: the number of heads whose keys a layer keeps.
        layers: the number of layers of the model.
        decodes: whether the cache belongs to the decoder of an encoder-decoder, whose encoder has no cache.
        dropped: arguments that HF PEFT does not pass on.
        types: the argument from whose types of tokens the model's code makes masks; empty if there is none. It looks
            them up at the places of the cache, so the prefix has types too.
        plain: the type of a token that sees no token behind it.
    """

    heads: int
    layers: int
    decodes: bool = False
    dropped: frozenset[str] = frozenset()
    types: str = ""
    plain: int = 0

    @property
    def _masks(self) -> str:
        return "decoder_attention_mask" if self.decodes else "attention_mask"

    def check(self, inputs: Mapping[str, object]) -> None:
        refuse_packed(inputs)
        mask = inputs.get(self._masks)
        if isinstance(mask, Tensor) and mask.ndim != 2:
            what = f"a prefix cannot be added to a mask of {mask.ndim} axes"
            raise PeftfxError(what, self._masks, "pass it as [batch, sequence]")
        given = next((name for name in (_CACHE, "past_key_values") if inputs.get(name) is not None), None)
        if given is not None:
            raise PeftfxError("the call has a cache, but the prefix is its cache already", given, "leave it out")

    def __call__(self, call: EntryCall, base: nn.Module, hole: Tensor, arguments: Mapping[str, object]) -> object:
        _refuse_checkpointing(base)
        given = {name: value for name, value in arguments.items() if name not in self.dropped}
        count, mask, positions = hole.shape[0], given.get(self._masks), given.get(_positions(self.decodes))
        if isinstance(mask, Tensor):
            given[self._masks] = torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
        if isinstance(positions, Tensor):
            given[_positions(self.decodes)] = positions + count
        if isinstance(types := given.get(self.types), Tensor):
            given[self.types] = after_prefix(types, count, self.plain)
        width = hole.shape[1] // (2 * self.layers * self.heads)  # of a hole without rows, -1 could be any number
        table = hole.unflatten(1, (2 * self.layers, self.heads, width)).permute(1, 2, 0, 3)
        rows = table.expand(_batch(arguments), *table.shape).unbind(1)
        cache = _filled(rows)
        output = call(base, {**given, _CACHE: _beside_encoder(cache) if self.decodes else cache})
        if any(getattr(layer, "keys", None) is rows[2 * i] for i, layer in enumerate(cache.layers)):
            raise _no_place(base)
        return _without_cache(output)


def after_prefix(types: Tensor, count: int | torch.SymInt, plain: int) -> Tensor:
    """Return types of tokens, [batch, tokens], with a plain type before them for each token of a prefix."""
    return torch.cat([types.new_full((types.shape[0], count), plain), types], dim=1)


def cache_shape(base: nn.Module, decodes: bool) -> tuple[int, int, int]:
    """Return the number of layers, of heads, and of features of a head in the model's key/value cache.

    They are measured by a run on fake tensors with an empty cache, which works for any architecture. The result is
    kept, because each call with a prefix needs it, and measured again if the model's modules or config change.

    Raises:
        PeftfxError: the model keeps no cache or states, or the layers of its cache differ.
    """
    made_of = decodes, sum(1 for _ in base.modules()), repr(_fields(base))
    found = _shapes.get(base)
    if found is None or found[0] != made_of:
        found = _shapes[base] = made_of, _measured(base, decodes)
    return found[1]


_shapes: WeakKeyDictionary[nn.Module, tuple[object, tuple[int, int, int]]] = WeakKeyDictionary()


def _fields(base: nn.Module) -> object:
    config = getattr(base, "config", None)
    return getattr(config, "__dict__", config)


def _measured(base: nn.Module, decodes: bool) -> tuple[int, int, int]:
    if offloaded := fetched(own_modules(base)):
        base = copied(base, offloaded)  # without hooks, which would fetch weights from disk for fake tensors
    example = example_inputs(base)
    text = {name: value for name, value in example.items() if name in _TEXT}
    try:
        cache = _filled_by(base, example, decodes)
    except PeftfxError:  # code that reads images may read their values
        if len(text) == len(example):
            raise
        cache = _filled_by(base, text, decodes)
    shapes = [tuple(_shape(getattr(layer, name, None)) for name in ("keys", "values")) for layer in cache.layers]
    own = [None not in pair for pair in shapes]
    if not any(own):
        raise _no_place(base)
    if not all(own):
        what = f"{own.count(False)} of the model's {len(own)} layers keep no keys and values of their own"
        hint = "use prompt tuning, or a method that acts on weights"
        raise PeftfxError(f"{what}, but a prefix has some for each layer", type(base).__name__, hint)
    if len({shape for pair in shapes for shape in pair}) != 1:
        what = "the model's layers have keys and values of different shapes, but a prefix has only one shape"
        raise PeftfxError(what, type(base).__name__, "use a method that acts on weights, such as LoRA")
    heads, features = shapes[0][0] or (0, 0)
    return len(shapes), heads, features


def _filled_by(base: nn.Module, inputs: Mapping[str, Tensor], decodes: bool) -> DynamicCache:
    """Return an empty cache that a run of the model on fake tensors has filled.

    Raises:
        PeftfxError: the model does not run so.
    """
    cache = _empty()
    with fake_run(base) as fake:
        given = {name: fake(t) for name, t in inputs.items()}
        try:
            base(**given, **{_CACHE: _beside_encoder(cache) if decodes else cache})
        except (TypeError, DataDependentOutputException) as error:  # no such argument, or images in the text
            raise _no_place(base) from error
        except Exception as error:  # a model's code raises various errors for a cache of another kind than its own
            raise_if_memory_is_out(error)
            raise _not_run(base, error) from error
    return cache


def _shape(keys: object) -> tuple[int, int] | None:
    return (int(keys.shape[1]), int(keys.shape[3])) if isinstance(keys, Tensor) and keys.ndim == 4 else None


def _refuse_checkpointing(base: nn.Module) -> None:
    """Refuse a prefix with gradient checkpointing, as HF PEFT does: checkpointed layers drop the cache."""
    checkpointed = (module for module in base.modules() if getattr(module, "gradient_checkpointing", False))
    if base.training and torch.is_grad_enabled() and next(checkpointed, None) is not None:
        raise no_checkpointing(base)


def no_checkpointing(base: nn.Module) -> PeftfxError:
    """Return the error for a prefix whose model is to be trained with gradient checkpointing."""
    what = "a prefix does not work with gradient checkpointing: it is a cache, which checkpointed layers drop"
    hint = (
        "call gradient_checkpointing_disable() (TRL switches it on: gradient_checkpointing=False), adapt with "
        'road="graph", or train, for example, PromptTuning'
    )
    return PeftfxError(what, type(base).__name__, hint)


def _no_place(base: nn.Module) -> PeftfxError:
    hint = "use prompt tuning, or a method that acts on weights"
    return PeftfxError("the model keeps no keys and values, so a prefix has no place", type(base).__name__, hint)


def _not_run(base: nn.Module, error: Exception) -> PeftfxError:
    what = f"the model does not run with a cache of keys and values, so a prefix has no place: {first_line(error)}"
    if keeps_states(base):
        what = "the model's layers keep states, so a prefix, which is keys and values alone, has no place"
    return PeftfxError(what, type(base).__name__, "use prompt tuning, or a method that acts on weights")


def _positions(decodes: bool) -> str:
    return f"decoder_{POSITIONS}" if decodes else POSITIONS


_OF_TEXT = ("input_ids", "inputs_embeds", "attention_mask")  #: arguments with a row for each text


def _batch(arguments: Mapping[str, object]) -> int | torch.SymInt:
    # A text sets the number of rows, before images that may come first and may be of another number.
    ranked = [arguments.get(name) for name in _OF_TEXT] + list(arguments.values())
    first = next((v for v in ranked if isinstance(v, Tensor) and v.ndim > 1), None)
    if first is None:
        raise PeftfxError("no tensor of the call tells the number of rows", ", ".join(arguments), "pass input_ids")
    return first.shape[0]


def _empty() -> DynamicCache:
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def _filled(rows: tuple[Tensor, ...]) -> DynamicCache:
    """Return a cache that holds these keys and values."""
    from transformers.cache_utils import DynamicLayer

    cache = _empty()
    for keys, values in zip(rows[::2], rows[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _beside_encoder(cache: DynamicCache) -> Cache:
    """Return a decoder's cache whose part for the encoder is empty."""
    from transformers.cache_utils import EncoderDecoderCache

    return EncoderDecoderCache(cache, _empty())


def _without_cache(output: object) -> object:
    """Return the model's output without caches in it and in its parts, as a forward view has none."""
    from transformers.cache_utils import Cache
    from transformers.utils.generic import ModelOutput

    if isinstance(output, ModelOutput):
        kept = {name: _without_cache(value) for name, value in output.items() if not isinstance(value, Cache)}
        return type(output)(**kept)
    if isinstance(output, tuple):
        return tuple(_without_cache(value) for value in output if not isinstance(value, Cache))
    return output
