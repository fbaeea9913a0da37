"""layer_kinds: what tells the layers of a model apart, and the calls of a layer: of one kind are those that are equal.

A kind is told by what a layer's code can read: class, mode and attributes of each module in it, shapes and dtypes of
weights, arguments by value and tensors by shape, and what the cache holds for it. The layer's own number is left out of
it; what stands at that number in a list of a config, or of a module, is not.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers import Cache, EncoderDecoderCache, cache_utils

_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "idx"})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INNER = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_HOOKS})
_FEWEST = 3  #: layers of one class for which copies can pay


class Unknown(Exception):
    """A layer, or a call of it, that cannot be told from another."""


class Number(int):
    """A layer's own number, which tells whether its code computes with it.

    As an index into a list it is not seen: what stands there is part of the kind. Nor is its use in a cache, which asks
    for nothing but the place.
    """

    used = False

    def _see(self) -> None:
        if sys._getframe(2).f_code.co_filename != cache_utils.__file__:
            self.used = True


def _seen(name: str) -> Callable[..., object]:
    own = getattr(int, name)

    def method(self: Number, *args: object) -> object:
        self._see()
        return own(self, *args)

    return method


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rdivmod", "rpow", "neg", "pos", "abs", "invert"),
    *("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "float", "str", "format", "round"),
):
    setattr(Number, f"__{_name}__", _seen(f"__{_name}__"))


def layers_of(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that stand in lists with others of their class, by the identity of their attributes."""
    found: dict[int, nn.Module] = {}
    for held in model.modules():
        if isinstance(held, (nn.ModuleList, nn.Sequential)):
            counts = Counter(type(module) for module in held)
            for module in held:
                if counts[type(module)] >= _FEWEST and any(True for _ in module.children()):
                    found[id(vars(module))] = module
    return found


@contextmanager
def numbered(layer: nn.Module) -> Iterator[list[Number]]:
    """Inside, each number of its own that the layer knows tells of its uses."""
    found = [(vars(m), k, v) for m in layer.modules() for k, v in vars(m).items() if k in _NUMBERS and type(v) is int]
    numbers = [Number(value) for _, _, value in found]
    for (own, name, _), number in zip(found, numbers, strict=True):
        own[name] = number
    try:
        yield numbers
    finally:
        for own, name, value in found:
            own[name] = value


Find = Callable[[Tensor], "fx.Node | None"]


@dataclass
class LayerCall:
    """One call of a layer.

    Attributes:
        key: of its kind.
        entries: every tensor that its code can read, by what the layer calls it.
        nodes: of these.
        labels: what the layer calls a tensor, by its node.
        names: the same, by the tensor's identity.
        caches: by the argument's name.
        places: what the layer's own part of each cache holds, by the same, and what it held.
    """

    key: object = None
    entries: dict[object, Tensor] = field(default_factory=dict)
    nodes: dict[object, fx.Node] = field(default_factory=dict)
    labels: dict[fx.Node, object] = field(default_factory=dict)
    names: dict[int, object] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)
    places: dict[str, tuple[dict[str, object], dict[str, object]]] = field(default_factory=dict)

    @staticmethod
    def shape(tensor: Tensor) -> object:
        """What a tensor without data is."""
        sizes = [getattr(getattr(n, "node", None), "expr", n) for n in (*tensor.shape, *tensor.stride())]
        return tuple(sizes), tensor.dtype, tensor.device, tensor.requires_grad

    @staticmethod
    def is_cache(value: object) -> bool:
        """Whether a value is a cache, which pytree must not open."""
        return isinstance(value, Cache)

    def label(self, tensor: Tensor) -> object:
        """What the layer calls a tensor that it was given; `None` for another."""
        return self.names.get(id(tensor))

    def value(self, value: object) -> object:
        """Something that stands for a value which is no tensor of the call."""
        if isinstance(value, torch.types.py_sym_types):
            return "size", value.node.expr
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(self.value, value))
        if isinstance(value, dict):
            return dict, tuple((self.value(k), self.value(v)) for k, v in value.items())
        if isinstance(value, functools.partial):
            return functools.partial, self.value(value.func), self.value(value.args), self.value(value.keywords)
        return "object", id(value)

    def enter(self, label: object, tensor: Tensor, find: Find) -> object:
        """Take a tensor in; what it is, and which of the others is the same one."""
        node = find(tensor)
        self.entries[label] = tensor
        self.names.setdefault(id(tensor), label)
        if node is None:
            return LayerCall.shape(tensor), id(tensor)
        self.nodes[label] = node
        return LayerCall.shape(tensor), self.labels.setdefault(node, label)

    def held(self, layer: nn.Module) -> list[tuple[object, list[object]]]:
        """What the call must leave as it is: the layer's attributes and weights, and other layers' parts of caches."""
        found: list[object] = []
        for module in layer.modules():
            found += vars(module), module._parameters, module._buffers
        for cache in self.caches.values():
            parts = [vars(part) for part in cache.layers]
            found += (part for part in parts if not any(part is own for own, _ in self.places.values()))
            found += vars(cache), cache.layers
        return [(container, _contents(container)) for container in found]

    def changes(self, held: list[tuple[object, list[object]]]) -> dict[str, object]:
        """What the call put into its caches.

        Raises:
            Unknown: it wrote something else.
        """
        for container, before in held:
            now = _contents(container)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before)):
                raise Unknown
        found: dict[str, object] = {}
        for name, (own, earlier) in self.places.items():
            found |= {f"{name}.{k}": v for k, v in own.items() if k not in earlier or earlier[k] is not v}
            if earlier.keys() - own.keys():
                raise Unknown
        return found

    def change(self, changes: Mapping[str, object]) -> None:
        """Put into its caches what another call put into its own."""
        for name, value in changes.items():
            place, _, attribute = name.rpartition(".")
            self.places[place][0][attribute] = value


def _contents(container: object) -> list[object]:
    if isinstance(container, dict):
        return [*container, *container.values()]
    return list(container)  # type: ignore[call-overload]


def described(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], find: Find, held: list[object]
) -> LayerCall:
    """A call of a layer.

    Args:
        layer: the module.
        args, kwargs: what it is called with.
        find: the node of a tensor.
        held: takes what must live as long as the key is used.

    Raises:
        Unknown: it cannot be told from another.
    """
    call = LayerCall()
    number = _number_of(layer)
    modules = [_module(call, path, module, number, find) for path, module in layer.named_modules()]
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=LayerCall.is_cache)
    given: list[object] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            given.append(call.enter(("argument", i), leaf, find))
        elif isinstance(leaf, Cache):
            given.append(_cache(call, f"cache {i}", leaf, number, find))
        else:
            given.append(call.value(leaf))
    held += leaves
    call.key = tuple(modules), str(spec), tuple(given)
    hash(call.key)
    return call


def _number_of(layer: nn.Module) -> int | None:
    found = {v for m in layer.modules() for k, v in vars(m).items() if k in _NUMBERS and type(v) is int}
    if len(found) > 1:
        raise Unknown
    return next(iter(found), None)


def _module(call: LayerCall, path: str, module: nn.Module, number: int | None, find: Find) -> object:
    own = vars(module)
    if any(own.get(name) for name in _HOOKS if path) or "forward" in own:
        raise Unknown
    tensors = [(name, tensor) for part in ("_parameters", "_buffers") for name, tensor in own[part].items()]
    weights = [(name, None if tensor is None else call.enter((path, name), tensor, find)) for name, tensor in tensors]
    rest = tuple(
        (name, "number" if name in _NUMBERS and type(value) is int else _attribute(call, value, number))
        for name, value in own.items()
        if name not in _INNER
    )
    return path, type(module), tuple(weights), rest


def _attribute(call: LayerCall, value: object, number: int | None) -> object:
    """An attribute's value, and what stands at the layer's number in its lists: a config's are those of the model."""
    lists = [value] if isinstance(value, (list, tuple)) else []
    if not isinstance(value, (*_PLAIN, list, tuple, dict, nn.Module, Tensor)) and hasattr(value, "to_dict"):
        lists = [v for v in vars(value).values() if isinstance(v, (list, tuple))]
    at = tuple(call.value(v[number]) for v in lists if number is not None and number < len(v))
    return call.value(value), at


def _cache(call: LayerCall, label: str, cache: Cache, number: int | None, find: Find) -> object:
    """What a cache holds for the layer of this number."""
    if isinstance(cache, EncoderDecoderCache):
        if cache.is_updated.get(number):  # type: ignore[arg-type]
            raise Unknown
        inner = (cache.self_attention_cache, cache.cross_attention_cache)
        return tuple(_cache(call, f"{label}/{i}", part, number, find) for i, part in enumerate(inner))
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
