"""Described values: what Python values a layer's code can read, so that equal descriptions mean equal values.

Code reads more than a value itself. From a list that has an entry for each layer it reads the one at the layer's own
number, and from an object, such as a config, its attributes. It reads what its names stand for, and a function what it
encloses. So all these are described too. Tensors that are no arguments or weights are told apart by identity.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, FunctionType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The attributes of a module that are described by themselves.
PARTS_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
_WHOLE = (ModuleType, Tensor)  #: objects whose attributes say nothing
_DATA = (bool, int, float, complex, str, list, tuple, dict, set)  #: what code reads by name, and may change
_FEWEST = 3  #: the fewest entries of a list that has one for each layer
_DEPTH = 3  #: of objects in attributes of objects
_MOST = 1000  #: the most items of a collection that are compared


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
    entered: set[int] = field(default_factory=set)  #: the lists whose entry at the number is described by itself
    open: set[int] = field(default_factory=set)  #: the collections that are being described

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
        if isinstance(value, np.ndarray) and value.size <= _MOST:
            return np.ndarray, value.dtype.str, self.describe(value.tolist(), depth)
        if isinstance(value, Iterator):
            return object()  # its next item can be another
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, functools.partial):
            return functools.partial, *(self.describe(v, depth) for v in (value.func, value.args, value.keywords))
        if isinstance(value, (tuple, list, deque, set, frozenset, dict)):
            return self._collection(value, depth)
        self._object(value, depth)
        return "object", id(value)

    def has_entry(self, container: object) -> bool:
        """Return whether a list has its entry at the layer's number described by itself."""
        return type(container) in (list, tuple, deque) and id(container) in self.entered

    def _collection(self, value: Collection[object], depth: int) -> object:
        self.kept.append(value)
        if id(value) in self.open or len(value) > _MOST:  # one that holds itself, or a table of something else
            return "object", id(value)
        self.open.add(id(value))
        try:
            return self._items(value, depth)
        finally:
            self.open.remove(id(value))

    def _items(self, value: Collection[object], depth: int) -> object:
        if not isinstance(value, (tuple, frozenset)):
            self.containers.append(value)
        if isinstance(value, dict):
            return dict, tuple((self.describe(k, depth), self.describe(v, depth)) for k, v in value.items())
        found = [self.describe(v, depth) for v in value]
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(found)
        if self.number is None or len(found) < _FEWEST:
            return type(value), tuple(found)
        self.entered.add(id(value))
        return type(value), tuple(found), *found[self.number :][:1]

    def _function(self, value: FunctionType, depth: int) -> object:
        self.kept.append(value)
        if depth == _DEPTH:
            return "function", id(value)
        enclosed = (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        read = (*enclosed, value.__defaults__, *(v for v in named if isinstance(v, _DATA)))
        return "function", id(value), *(self.describe(v, depth + 1) for v in read)

    def class_of(self, module: nn.Module) -> object:
        """Return a description of what the code of a module's class reads by name, and of the class's own lists."""
        kind: type = type(module)
        lists = (getattr(kind, name) for name in _lists_of(kind))
        named = ((names, name) for names, name in _names_of(kind) if isinstance(names.get(name), _DATA))
        return *map(self.describe, lists), *(self.describe(names[name]) for names, name in named)

    def _object(self, value: object, depth: int) -> None:
        """Describe the attributes of an object, and of the objects in them, once."""
        self.kept.append(value)
        own = getattr(value, "__dict__", None)
        if id(value) in self.objects or type(own) is not dict or depth == _DEPTH or isinstance(value, _WHOLE):
            return
        self.objects[id(value)] = None
        self.containers.append(own)
        left_out = PARTS_OF_MODULES if isinstance(value, nn.Module) else ()
        inner = [(name, v) for name, v in own.items() if name not in left_out]
        self.objects[id(value)] = tuple((name, self.describe(v, depth + 1)) for name, v in inner)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _classes(kind: type) -> Iterator[type]:
    """Yield a module's class and those that it is made of, but for torch's own."""
    return (k for k in kind.__mro__ if not k.__module__.startswith("torch.") and k is not object)


@functools.cache
def _lists_of(kind: type) -> tuple[str, ...]:
    return tuple(name for k in _classes(kind) for name, v in vars(k).items() if isinstance(v, (list, tuple, dict)))


@functools.cache
def _names_of(kind: type) -> tuple[tuple[dict[str, object], str], ...]:
    """Return the names that the code of a class reads, and where they stand."""
    functions = [inspect.unwrap(v) for k in _classes(kind) for v in vars(k).values() if isinstance(v, FunctionType)]
    return tuple((f.__globals__, n) for f in functions for n in f.__code__.co_names if n in f.__globals__)


def contents(container: object) -> list[object]:
    """Return what a list or a set holds now, or the keys and values of a mapping."""
    if isinstance(container, Mapping):
        return [*container, *container.values()]
    return list(container)  # type: ignore[call-overload]
