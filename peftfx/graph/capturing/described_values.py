"""Described values: what Python values a layer's code can read, so that equal descriptions mean equal values.

Code reads more than a value itself. From a list that has an entry for each layer it reads the one at the layer's own
number, and from an object, such as a config, its attributes. So both are described too. Tensors that are no arguments
or weights, functions and whole modules are told apart by identity.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn
from transformers import Cache

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The attributes of a module that are described by themselves.
PARTS_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
_WHOLE = (FunctionType, ModuleType, Tensor)  #: objects whose attributes say nothing
_FEWEST = 3  #: the fewest entries of a list that has one for each layer
_DEPTH = 3  #: of objects in attributes of objects


@dataclass
class DescribedValues:
    """The values of one call of a layer.

    Attributes:
        label: gives the layer's own name for a tensor of the call; None for another tensor.
        number: the layer's own number, if it has one.
        containers: the lists, dicts, sets, and attributes of objects that were met. What they hold is described, so a
            call that changes them is more than its results.
        objects: the description of each object that was met, by its identity.
        kept: the objects that are told by their identity, which must live as long as a description is used.
    """

    label: Callable[[Tensor], object]
    number: int | None = None
    containers: list[object] = field(default_factory=list)
    objects: dict[int, object] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)

    def describe(self, value: object, depth: int = 0) -> object:
        """Return a hashable description of a value."""
        if isinstance(value, torch.types.py_sym_types):
            return "size", value.node.expr
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, Tensor) and (label := self.label(value)) is not None:
            return "tensor", label
        if isinstance(value, Cache):  # its part for the layer is described by itself
            return "cache", id(value)
        if isinstance(value, functools.partial):
            return functools.partial, *(self.describe(v, depth) for v in (value.func, value.args, value.keywords))
        if isinstance(value, (tuple, list, deque, set, frozenset, dict)):
            return self._collection(value, depth)
        self._object(value, depth)
        return "object", id(value)

    def _collection(self, value: object, depth: int) -> object:
        if not isinstance(value, (tuple, frozenset)):
            self.containers.append(value)
        if isinstance(value, dict):
            return dict, tuple((self.describe(k, depth), self.describe(v, depth)) for k, v in value.items())
        found = [self.describe(v, depth) for v in value]  # type: ignore[attr-defined]
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(found)
        number = self.number if len(found) >= _FEWEST else None
        return type(value), tuple(found), *(() if number is None else found[number:][:1])

    def _object(self, value: object, depth: int) -> None:
        """Describe the attributes of an object, and of the objects in them, once."""
        self.kept.append(value)
        own = getattr(value, "__dict__", None)
        if id(value) in self.objects or type(own) is not dict or depth == _DEPTH or isinstance(value, _WHOLE):
            return
        self.objects[id(value)] = None
        self.containers.append(own)
        left_out = PARTS_OF_MODULES if isinstance(value, nn.Module) else ()
        inner = ((name, v) for name, v in own.items() if name not in left_out)
        self.objects[id(value)] = tuple((name, self.describe(v, depth + 1)) for name, v in inner)


def contents(container: object) -> list[object]:
    """Return what a list or a set holds now, or the keys and values of a mapping."""
    if isinstance(container, Mapping):
        return [*container, *container.values()]
    return list(container)  # type: ignore[call-overload]
