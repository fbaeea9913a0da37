"""Described values: what Python values a layer's code can read, so that equal descriptions mean equal values.

Code reads more than a value itself. From a list that has an entry for each layer it reads the one at the layer's own
number, and from an object, such as a config, its attributes. It reads what its names stand for, and a function what it
encloses. So all these are described too. Tensors that are no arguments or weights are told apart by identity.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The attributes of a module that are described by themselves.
PARTS_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
_WHOLE = (ModuleType, Tensor)  #: objects whose attributes say nothing
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakSet)
_DATA = (bool, int, float, complex, str, list, tuple, dict, set, *_WEAK)  #: what code reads by name, and may change
_OF_NO_MODULE = vars(nn.Module())  #: the attributes of a module without any of its own
_LIBRARIES = frozenset({"torch", "transformers", "numpy", *sys.stdlib_module_names})  #: whose own names stay
_FEWEST = 3  #: the fewest entries of a list that has one for each layer
_DEPTH = 3  #: of objects in attributes of objects
_MOST = 1000  #: the most items of a collection that are compared


@dataclass
class DescribedValues:
    """The values of one call of a layer.

    Attributes:
        label: gives the layer's own name for a tensor of the call; None for another tensor.
        number: the layer's own number, if it has one.
        own: the paths of the layer's modules, by their identity: code may look them up in a dict.
        containers: the lists, dicts, sets, and attributes of objects that were met. What they hold is described, so a
            call that changes them is more than its results.
        objects: the description of each object that was met, by its identity.
        kept: the objects that are told by their identity, which must live as long as a description is used.
    """

    label: Callable[[Tensor], object]
    number: int | None = None
    own: dict[int, str] = field(default_factory=dict)
    containers: list[object] = field(default_factory=list)
    objects: dict[int, object] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)
    entered: set[int] = field(default_factory=set)  #: the lists whose entry at the number is described by itself
    open: set[int] = field(default_factory=set)  #: the collections that are being described

    def describe(self, value: object, depth: int = 0) -> object:
        """Return a hashable description of a value."""
        if isinstance(value, torch.types.py_sym_types):
            return "size", value.node.expr
        if type(value) is int and value in self.own:
            return "identity of", self.own[value]
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, Tensor) and (label := self.label(value)) is not None:
            return "tensor", label
        if isinstance(value, Cache):  # its part for the layer is described by itself
            return "cache", id(value)
        if isinstance(value, np.ndarray) and value.size <= _MOST:
            return np.ndarray, value.dtype.str, self.describe(value.tolist(), depth)
        if isinstance(value, weakref.ref):
            return "reference", self.describe(value(), depth)
        if isinstance(value, Iterator):
            return object()  # its next item can be another
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, functools.partial):
            return functools.partial, *(self.describe(v, depth) for v in (value.func, value.args, value.keywords))
        if isinstance(value, (tuple, list, deque, set, frozenset, dict)):
            return self._collection(value, depth)
        if isinstance(value, nn.Module) and id(value) not in self.own and is_only_code(value):
            self.kept.append(value)
            self.containers.append(vars(value))
            return "code", type(value), value.training, self.class_of(value)
        self._object(value, depth)
        return "object", id(value), self.own.get(id(value))

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
        read = (self.describe(v, depth + 1) for v in (*enclosed, value.__defaults__))
        return "function", id(value), *read, *self._named(_names_of_function(value), depth + 1)

    def class_of(self, module: nn.Module) -> object:
        """Return a description of what the code of a module's class reads by name, and of the class's own lists."""
        kind: type = type(module)
        lists = (getattr(kind, name) for name in _lists_of(kind))
        return *map(self.describe, lists), *self._named(_names_of(kind), 0)

    def _named(self, places: _Places, depth: int) -> Iterator[object]:
        values = (_current(place.get(name)) for place, name in places)
        return (self.describe(value, depth) for value in values if value is not None)

    def _object(self, value: object, depth: int) -> None:
        """Describe the attributes of an object, and of the objects in them, once."""
        self.kept.append(value)
        own, slots = getattr(value, "__dict__", None), _Slots(value)
        if id(value) in self.objects or depth == _DEPTH or isinstance(value, _WHOLE):
            return
        if type(own) is not dict and not slots.names:
            return
        self.objects[id(value)] = None
        self.containers += [slots] if own is None else [own, slots]
        left_out = PARTS_OF_MODULES if isinstance(value, nn.Module) else ()
        held = [(name, v) for name, v in {**(own or {}), **slots}.items() if name not in left_out]
        inner = tuple((name, self.describe(v, depth + 1)) for name, v in held)
        kind: type = type(value)
        places = () if _is_of_library(kind) else _names_of(kind)
        self.objects[id(value)] = inner, *self._named(places, depth + 1)


class _Slots(Mapping[str, object]):
    """What an object holds in `__slots__`, now."""

    def __init__(self, value: object) -> None:
        declared = (vars(k).get("__slots__", ()) for k in type(value).__mro__)
        names = itertools.chain.from_iterable((d,) if isinstance(d, str) else d for d in declared)
        self.value, self.names = value, tuple(name for name in names if not name.startswith("__"))

    def __getitem__(self, name: str) -> object:
        return getattr(self.value, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if hasattr(self.value, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def is_only_code(module: nn.Module) -> bool:
    """Return whether a module has nothing but its class: transformers keeps one for each function of a kernel."""
    own = vars(module)
    return own.keys() == _OF_NO_MODULE.keys() and all(own[k] == v for k, v in _OF_NO_MODULE.items() if k != "training")


def _is_of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _current(value: object) -> object:
    """Return what a name stands for if it is data, or the current value of a context variable; None for all else."""
    held = value.get(None) if isinstance(value, ContextVar) else value
    return held if isinstance(held, _DATA) else None


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
    """Return the names of a class's lists, but for Python's own: `__static_attributes__` has no entry for a layer."""
    held = (item for k in _classes(kind) for item in vars(k).items() if not item[0].startswith("__"))
    return tuple(name for name, value in held if isinstance(value, (list, tuple, dict)))


_Places = tuple[tuple[Mapping[str, object], str], ...]
_PLACES: dict[tuple[CodeType, int], _Places] = {}  #: of functions, by their code and the identity of their module


@functools.cache
def _names_of(kind: type) -> _Places:
    """Return the names of data that the code of a class reads, and where they stand."""
    methods = [inspect.unwrap(f) for k in _classes(kind) for held in vars(k).values() for f in _code_of(held)]
    return _names_read_by(methods)


def _names_of_function(function: FunctionType) -> _Places:
    key = function.__code__, id(function.__globals__)
    if key not in _PLACES:
        _PLACES[key] = _names_read_by([function])
    return _PLACES[key]


def _names_read_by(functions: Iterable[FunctionType]) -> _Places:
    """Return the names of data that functions read, and where they stand.

    They are names in the functions' modules, and in what these names stand for: `state.scale`. Functions that are
    named, but for torch's own, are read too.
    """
    found: dict[tuple[int, str], tuple[Mapping[str, object], str]] = {}
    left, seen = list(functions), set[CodeType]()
    while left:
        function = left.pop()
        if function.__code__ in seen or (function.__module__ or "").startswith("torch."):
            continue
        seen.add(function.__code__)
        names, outer = set(names_in(function.__code__)), function.__globals__
        values = [outer[name] for name in names & outer.keys()]
        left += [inspect.unwrap(value) for value in values if isinstance(value, FunctionType)]
        for place in (outer, *(vars(value) for value in values if hasattr(value, "__dict__"))):
            found |= {(id(place), name): (place, name) for name in names & place.keys() if not callable(place[name])}
    return tuple(found.values())


def _code_of(value: object) -> Iterator[FunctionType]:
    """Yield the functions of an attribute of a class: of a method, a property, or another descriptor."""
    parts = (getattr(value, name, None) for name in ("fget", "__func__", "func"))
    described = hasattr(type(value), "__get__") and not _is_of_library(type(value))
    own = vars(type(value)).values() if described else ()
    return (part for part in (value, *parts, *own) if isinstance(part, FunctionType))


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that code reads, and the functions and comprehensions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def contents(container: object) -> list[object]:
    """Return what a list or a set holds now, or the keys and values of a mapping."""
    if isinstance(container, Mapping):
        return [*container, *container.values()]
    return list(container)  # type: ignore[call-overload]
