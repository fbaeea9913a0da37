"""Kinds of layers: tells which layers of a model, and which of their calls, are equal but for weights and inputs.

A kind is described by all that a layer's code can read. Of each module in the layer that is its class, mode and
attributes, and the shapes and dtypes of its weights. Of a call it is the arguments by value, tensors by shape, the
layer's part of the cache, and the modes of torch. The layer's own number is left out of the description, but the
entries at that number in lists are included: see `layer_numbers.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache, EncoderDecoderCache

from peftfx.graph.capturing.described_values import HOOKS, PARTS_OF_MODULES, DescribedValues, contents
from peftfx.graph.capturing.layer_numbers import NUMBERS, ModulesOf, is_place

_TRIALS = 4  #: the most layers of a kind that are run to find two that leave the same
#: The attribute by which a tensor that stands for one of the model's has all attributes that code set on the model's.
NOTES = "_notes_of_the_model"
_FEWEST = 3  #: the fewest layers of one class for which copies can save time


class Unknown(Exception):
    """Raised for a layer or a call whose kind cannot be known."""


def layers_of(model: nn.Module) -> dict[int, nn.Module]:
    """Return the modules that are in lists with others of their class, by the identity of their attributes."""
    found: dict[int, nn.Module] = {}
    for held in model.modules():
        if isinstance(held, (nn.ModuleList, nn.Sequential)):
            counts = Counter(type(module) for module in held)
            for module in held:
                if counts[type(module)] >= _FEWEST and any(True for _ in module.children()):
                    found[id(vars(module))] = module
    return found


class Described(Protocol):
    """What one call of a layer left."""

    @property
    def text(self) -> object:
        """A description without names and weights, which is equal for two layers that leave the same."""


_L = TypeVar("_L", bound=Described)


@dataclass
class Kind(Generic[_L]):
    """The state of one kind of layers.

    Attributes:
        last: what the last layer that ran left; None if it cannot stand for others.
        ready: whether it stands for the other layers, because two layers left the same.
        left: how many more layers are run to find two such layers.
    """

    last: _L | None = None
    ready: bool = False
    left: int = _TRIALS

    def note(self, now: _L | None) -> None:
        """Note what the next layer left. None ends the trials."""
        before, self.last = self.last, now
        self.ready = before is not None and now is not None and before.text == now.text
        self.left = self.left - 1 if now is not None else 0


Find = Callable[[Tensor], object]
"""Gives the node of a tensor, or what else stands for it; None for a tensor that is not computed."""


@dataclass
class LayerCall:
    """One call of a layer.

    Attributes:
        key: the key of its kind.
        entries: every tensor that the layer's code can read, by the layer's label for it.
        nodes: the nodes of these tensors, by label.
        labels: the layer's label for a tensor, by the tensor's node.
        names: the layer's label for a tensor, by the tensor's identity.
        caches: the caches, by the argument's name.
        places: what the layer's own part of each cache holds now, and what it held before, by the argument's name.
        filled: for each cache of an encoder-decoder, which layers' cross-attentions are filled, by the layers' numbers;
            this layer's number; and what was filled before.
        values: what else it can read.
    """

    key: object = None
    entries: dict[object, Tensor] = field(default_factory=dict)
    nodes: dict[object, Any] = field(default_factory=dict)
    labels: dict[Any, object] = field(default_factory=dict)
    names: dict[int, object] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)
    places: dict[str, tuple[dict[str, object], dict[str, object]]] = field(default_factory=dict)
    filled: dict[str, tuple[dict[int, bool], int, dict[int, bool]]] = field(default_factory=dict)
    values: DescribedValues = field(init=False)

    def __post_init__(self) -> None:
        self.values = DescribedValues(self.label)

    @staticmethod
    def shape(tensor: Tensor) -> object:
        """Return the sizes, strides, dtype and device of a tensor, and whether it needs a gradient."""
        sizes = [getattr(getattr(n, "node", None), "expr", n) for n in (*tensor.shape, *tensor.stride())]
        return tuple(sizes), tensor.dtype, tensor.device, tensor.requires_grad

    @staticmethod
    def is_cache(value: object) -> bool:
        """Return whether a value is a cache, which pytree must not flatten."""
        return isinstance(value, Cache)

    def label(self, tensor: Tensor) -> object:
        """Return the layer's name for a tensor of the call, or None for another tensor."""
        return self.names.get(id(tensor))

    def value(self, value: object) -> object:
        """Return a hashable description of a value that is no tensor of the call."""
        return self.values.describe(value)

    def has_entry(self, container: object) -> bool:
        """Return whether the entry of a list at the layer's number is described, or is its part of a cache."""
        in_caches = any(container is cache.layers for cache in self.caches.values())
        return in_caches or self._is_filled(container) or self.values.has_entry(container)

    def has_place(self, owner: object, method: str) -> bool:
        """Return whether a method takes the layer's number as its place in a cache of the call."""
        return is_place(owner, method, self.caches.values()) or (method == "get" and self._is_filled(owner))

    def _is_filled(self, container: object) -> bool:
        return any(container is filled for filled, _, _ in self.filled.values())

    def enter(self, label: object, tensor: Tensor, find: Find) -> object:
        """Record a tensor, and return its description and the label of an equal tensor of the call."""
        node = find(tensor)
        self.entries[label] = tensor
        self.names.setdefault(id(tensor), label)
        if node is None:
            return LayerCall.shape(tensor), id(tensor)
        self.nodes[label] = node
        return LayerCall.shape(tensor), self.labels.setdefault(node, label)

    def held(self, layer: nn.Module, modules: ModulesOf) -> list[tuple[object, list[object]]]:
        """Return what the call must not change: attributes, weights, other layers' caches, and all else it can read."""
        found: list[object] = [*self.values.containers]
        for _, module in modules(layer):
            found += vars(type(module)), vars(module), module._parameters, module._buffers
        for cache in self.caches.values():
            parts = [vars(part) for part in cache.layers]
            found += (part for part in parts if not any(part is own for own, _ in self.places.values()))
            found += vars(cache), cache.layers
        return [(container, contents(container)) for container in found]

    def changes(self, held: list[tuple[object, list[object]]]) -> dict[str, object]:
        """Return what the call wrote into its caches.

        Raises:
            Unknown: the call wrote something else.
        """
        for container, before in held:
            now = contents(container)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before)):
                raise Unknown
        found: dict[str, object] = {}
        for name, (own, earlier) in self.places.items():
            found |= {f"{name}.{k}": v for k, v in own.items() if k not in earlier or earlier[k] is not v}
            if earlier.keys() - own.keys():
                raise Unknown
        for name, (filled, number, noted) in self.filled.items():
            if {**filled, number: True} != {**noted, number: True}:
                raise Unknown
            if filled.get(number) != noted.get(number):
                found[name] = filled.get(number)
        return found

    def change(self, changes: Mapping[str, object]) -> None:
        """Write the changes that another call made to its caches into the caches of this call."""
        for name, value in changes.items():
            if name in self.filled:
                filled, number, _ = self.filled[name]
                filled[number] = bool(value)
                continue
            place, _, attribute = name.rpartition(".")
            self.places[place][0][attribute] = value


def described(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], find: Find, held: list[object], modules: ModulesOf
) -> LayerCall:
    """Return a description of a call of a layer.

    Args:
        layer: the module.
        args, kwargs: the arguments of the call.
        find: a function that gives the node of a tensor.
        held: a list to which the objects are added that must live as long as the key is used.
        modules: a function that gives the modules of the layer.

    Raises:
        Unknown: the kind of the call cannot be known.
    """
    call = LayerCall()
    parts = list(modules(layer))
    number = call.values.number = _number_of(module for _, module in parts)
    call.values.own = {id(module): path for path, module in parts}
    kinds = [_module(call, path, module, find) for path, module in parts]
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=LayerCall.is_cache)
    given: list[object] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            given.append((call.enter(("argument", i), leaf, find), _notes_on(call, leaf)))
        elif isinstance(leaf, Cache):
            given.append(_cache(call, f"cache {i}", leaf, number, find))
    collections = tuple(map(call.value, (*args, *kwargs.values())))
    held += (*leaves, *call.values.kept)
    call.key = tuple(kinds), str(spec), tuple(given), collections, tuple(call.values.objects.items()), _modes()
    hash(call.key)
    return call


def _number_of(modules: Iterable[nn.Module]) -> int | None:
    found = {v for m in modules for k, v in vars(m).items() if k in NUMBERS and type(v) is int}
    if len(found) > 1:
        raise Unknown
    return next(iter(found), None)


def _notes_on(call: LayerCall, tensor: Tensor) -> object:
    """Describe what code has noted on a tensor, as an attribute."""
    noted = {name: value for name, value in vars(tensor).items() if not name.startswith("_")}
    return tuple(
        (name, call.value(value)) for name, value in noted.items() if isinstance(value, (bool, int, float, str))
    )


def _modes() -> object:
    """Return the modes of torch in which code computes other nodes."""
    cast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.get_default_dtype(), tuple(cast)


def _module(call: LayerCall, path: str, module: nn.Module, find: Find) -> object:
    own = vars(module)
    if any(own.get(name) for name in HOOKS if path) or "forward" in own:
        raise Unknown
    tensors = [(name, tensor) for part in ("_parameters", "_buffers") for name, tensor in own[part].items()]
    noted = tuple(call.value(getattr(tensor, NOTES, None)) for _, tensor in tensors)
    weights = [(name, None if tensor is None else call.enter((path, name), tensor, find)) for name, tensor in tensors]
    rest = tuple(
        (name, "number" if name in NUMBERS and type(value) is int else call.value(value))
        for name, value in own.items()
        if name not in PARTS_OF_MODULES
    )
    return path, type(module), tuple(weights), noted, rest, call.values.class_of(module)


def _cache(call: LayerCall, label: str, cache: Cache, number: int | None, find: Find) -> object:
    """Describe what a cache holds for the layer of this number."""
    if isinstance(cache, EncoderDecoderCache):
        if number is None:
            raise Unknown
        call.filled[label] = cache.is_updated, number, dict(cache.is_updated)
        inner = (cache.self_attention_cache, cache.cross_attention_cache)
        parts = (_cache(call, f"{label}/{i}", part, number, find) for i, part in enumerate(inner))
        return cache.is_updated.get(number), *parts
    if number is not None and number == len(cache.layers) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())  # as the cache itself does when a layer first writes
    if number is None or number >= len(cache.layers):
        raise Unknown
    own = vars(cache.layers[number])
    call.caches[label], call.places[label] = cache, (own, dict(own))
    kept = [
        (name, call.enter((label, name), value, find) if isinstance(value, Tensor) else call.value(value))
        for name, value in own.items()
    ]
    rest = {name: value for name, value in vars(cache).items() if name != "layers"}
    return type(cache), call.value(rest), type(cache.layers[number]), tuple(kept)
