"""Fingerprints: the state besides tensors that a graph was made from, compared by value, and cheaply, at each call."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks

from peftfx.bases.config_fields import collect_configs
from peftfx.bases.guests import GUESTS, own_modules

#: The attributes that torch keeps in every module and a forward reads, but a graph does not read again when it runs.
_READ = frozenset({"_modules", "_forward_hooks", "_forward_pre_hooks"})
_TORCHS = frozenset(vars(nn.Module())) - {"training"}
_DEPTH, _MOST = 4, 1000  #: the deepest level of nested values that is compared, and the longest collection
#: The attributes that adapters put into a module, or that a capture sets itself: it never checkpoints layers.
_NEVER_READ = frozenset({GUESTS, "gradient_checkpointing", "_gradient_checkpointing_func"})
_CACHE = "use_cache"  #: an attribute of a config that a capture sets itself, too
_PLAIN = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, enum.Enum, type)


class ModelState:
    """A snapshot of a model's attributes, modes, hooks and modules.

    Parameters and buffers are not part of the snapshot, because a graph reads them when it runs. Long collections, and
    objects beyond a depth, are compared by identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks = _global_hooks()
        self._parts: list[tuple[dict[str, object], dict[str, object]]] = []
        seen: set[int] = set()
        configs: dict[int, object] = {}
        for _, module in own_modules(model):
            own = vars(module)
            self._parts.append((own, own.copy()))
            collect_configs(own.get("config"), configs)
            for name, value in own.items():
                if name in _READ or name not in _TORCHS:
                    self._parts += _containers(value, seen, _DEPTH)  # type: ignore[arg-type]
        self._configs = {id(vars(config)) for config in configs.values() if hasattr(config, "__dict__")}

    def holds(self) -> bool:
        """Return whether the model still has the state of the snapshot."""
        return self.difference() is None

    def difference(self) -> str | None:
        """Return the name of an attribute, or the key of an item, that differs; None if nothing differs."""
        if _global_hooks() != self._hooks:
            return "a hook for all modules"
        for now, then in self._parts:
            try:
                if now == then:
                    continue
            except (RuntimeError, ValueError, TypeError):  # tensors and arrays do not compare to a bool
                pass
            name = _first_other(*(self._read(part, now) for part in (now, then)))
            if name is not None:
                return name
        return None

    def _read(self, part: object, now: object) -> object:
        """Return the part of a container that a capture reads."""
        if not isinstance(part, dict):
            return part
        cache = id(now) in self._configs and isinstance(part.get(_CACHE), bool)
        unread = _NEVER_READ | {_CACHE} if cache else _NEVER_READ
        return {k: v for k, v in part.items() if k not in unread} if unread & part.keys() else part


def _global_hooks() -> tuple[int, ...]:
    return (*torch_hooks._global_forward_hooks, *torch_hooks._global_forward_pre_hooks)


def _containers(value: object, seen: set[int], depth: int) -> Iterator[tuple[object, object]]:
    """Yield each dict, list and set that a value is, holds or has as attributes, with a copy."""
    if isinstance(value, (nn.Module, Tensor, *_PLAIN, float, ModuleType)) or callable(value) or id(value) in seen:
        return
    own = value if isinstance(value, (dict, list, set)) else getattr(value, "__dict__", None)
    items = own.values() if isinstance(own, dict) else value if isinstance(value, (list, set, tuple)) else ()
    if not depth or len(items) > _MOST:
        return
    seen.add(id(value))
    if isinstance(own, (dict, list, set)):
        yield own, own.copy()
    for item in items:
        yield from _containers(item, seen, depth - 1)


def _first_other(now: object, then: object) -> str | None:
    """Return the key of a value that differs, or None; a value that is equal replaces the remembered object."""
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        for key, value in now.items():
            if value is not then[key]:
                if not _equal(value, then[key]):
                    return str(key)
                then[key] = value
        return None
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return None if all(map(_equal, now, then)) else "an item of a list"
    if isinstance(now, dict) and isinstance(then, dict):
        return str(next(iter(now.keys() ^ then.keys())))
    return "an item of a list or a set"


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    if isinstance(a, (dict, list, set)):
        return False  # another container: the graph was made from the contents of the first
    return type(a) is type(b) and value_key(a) == value_key(b)


def value_key(value: object, depth: int = _DEPTH) -> object:
    """Return a hashable key for an argument that is not a tensor of a call; keys are equal only for equal contents."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype != object:
            return "array", array.dtype.str, array.shape, _digest(array)
        value = array.tolist()
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return "tensor", value.dtype, value.shape, str(value.device), _digest(flat.numpy())
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, nn.Module)) or not depth:
        return value if value.__hash__ is not None else id(value)
    if isinstance(value, Mapping):
        return type(value), tuple((value_key(k), value_key(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(value_key(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value_key(v, depth - 1) for v in value)
    own = getattr(value, "__dict__", None)
    return (type(value), value_key(own, depth - 1)) if own else (type(value), repr(value))


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()
