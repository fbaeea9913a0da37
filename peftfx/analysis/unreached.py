"""Unreached modules: those that no call of the model can run, as no code that a call reaches names them.

A capture shows what one call runs, but not what another call might run. The proof is by names. From the `forward` of
each of the model's classes, every function that the code names in the model's own files is followed, and the attribute
names that these functions read are collected. If a function puts a name together, as in `getattr(self, self.prefix)`,
the texts in its code, and in the attributes that it reads, are collected too. A module whose name is not collected is
read only by other code. An example is T5's `shared`: it gives its weight to the embeddings of encoder and decoder when
they are built, and is never called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType

from torch import nn

from peftfx.bases.guests import own_class, own_modules
from peftfx.graph.capturing.described_values import names_in

#: Names by which code reaches submodules without naming them. For code that reads one of these there is no proof.
_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "__dict__"})
#: Libraries whose code knows no model's attributes by name, and the prefixes of the modules in them that are models.
_GENERAL = ("torch", "numpy", "builtins", "transformers", "typing", "enum")
_MODELS = ("transformers.models.", "transformers.modeling_layers")


def is_unreached(base: nn.Module, path: str) -> bool:
    """Return whether it is proven that no call of `base` runs the module at `path`, or one of its parents.

    False means no proof: the module may run in another call or another mode.
    """
    try:
        names = _read_by_calls(base)
    except _Unknown:
        return False
    parts = path.split(".")
    return any(_is_unnamed(base, ".".join(parts[: depth + 1]), names) for depth in range(len(parts)))


def _is_unnamed(base: nn.Module, path: str, names: _Names) -> bool:
    """Return whether no code that was read names this module. Modules in torch's containers are not judged."""
    owner, _, leaf = path.rpartition(".")
    if _is_general(type(base.get_submodule(owner)).__module__) or leaf in names.read:
        return False
    return not any(piece in leaf for piece in names.pieces) and _only_there(base, path)


@dataclass(frozen=True)
class _Names:
    """The names that some code reads, and the pieces of computed names, such as `getattr(self, f"layer{i}")`."""

    read: frozenset[str]
    pieces: frozenset[str]


def _only_there(base: nn.Module, path: str) -> bool:
    """Return whether this is the module's only path. A module with another path can be reached by that."""
    module = base.get_submodule(path)
    inner = {id(m) for m in module.modules()}
    paths = [p for p, m in own_modules(base, remove_duplicate=False) if id(m) in inner]
    return all(p == path or p.startswith(f"{path}.") for p in paths)


class _Unknown(Exception):
    """Raised where code is reached that may run any module."""


def _read_by_calls(base: nn.Module) -> _Names:
    """Return every name that reachable code of the model reads, as an attribute or as a text."""
    modules = [module for _, module in own_modules(base)]
    own = [f for m in modules for f in vars(m).values() if isinstance(f, (FunctionType, MethodType))]
    hooks = [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if any(not isinstance(h, (FunctionType, MethodType)) for h in hooks):
        raise _Unknown
    told = frozenset((n, text) for m in modules for n, text in vars(m).items() if isinstance(text, str))
    return _names_of(tuple(dict.fromkeys(own_class(m) for m in modules)), (*own, *hooks), told)


@functools.lru_cache(maxsize=8)
def _names_of(
    classes: tuple[type[nn.Module], ...], more: tuple[object, ...], told: frozenset[tuple[str, str]]
) -> _Names:
    members = _members(classes)
    for name, text in sorted(told):
        members.setdefault(name, []).append(text)
    read, pieces, seen = set[str](), set[str](), set[int]()
    roots = [*(cls.forward for cls in classes), *more]
    todo = [f for root in roots for f in _functions(root)]
    while todo:
        function = todo.pop()
        if id(function.__code__) in seen:
            continue
        seen.add(id(function.__code__))
        names, texts = set(names_in(function.__code__)), set(_texts_in(function.__code__))
        texts |= {text for name in names for text in members.get(name, ()) if isinstance(text, str) and text}
        computed = bool(names & {"getattr", "attrgetter", "__getattr__"})
        if names & _WALKS or (computed and not texts):
            raise _Unknown
        pieces |= texts if computed else set()
        todo += [f for name in names - read for member in members.get(name, ()) for f in _functions(member)]
        todo += [f for name in names for f in _functions(function.__globals__.get(name))]
        read |= names
    return _Names(frozenset(read), frozenset(pieces))


def _members(classes: Iterable[type]) -> dict[str, list[object]]:
    """Return what the model's classes define under each name, without torch's own classes."""
    owners = dict.fromkeys(owner for cls in classes for owner in cls.__mro__ if not _is_general(owner.__module__))
    found: dict[str, list[object]] = {}
    for owner in owners:
        for name, value in vars(owner).items():
            found.setdefault(name, []).append(value)
    return found


def _functions(value: object) -> Iterator[FunctionType]:
    """Yield the Python functions that use of this value may run: its own, wrapped functions, a class's methods."""
    todo, seen = [value], set[int]()
    while todo:
        item = todo.pop()
        if id(item) in seen or _is_general(getattr(item, "__module__", None) or ""):
            continue
        seen.add(id(item))
        if isinstance(item, FunctionType):
            yield item
            todo += [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
            todo += [item.__defaults__, getattr(item, "__wrapped__", None)]
        elif isinstance(item, MethodType | staticmethod | classmethod):
            todo.append(item.__func__)
        elif isinstance(item, property):
            todo += [item.fget]
        elif isinstance(item, functools.partial):
            todo += [item.func]
        elif isinstance(item, type) and not issubclass(item, nn.Module):
            todo += list(vars(item).values())
        elif isinstance(item, (tuple, list)):
            todo += list(item)
        elif isinstance(item, dict):
            todo += list(item.values())


def _is_filled(cell: object) -> bool:
    try:
        cell.cell_contents  # type: ignore[attr-defined]  # noqa: B018
    except ValueError:
        return False
    return True


def _is_general(module: str) -> bool:
    return module.partition(".")[0] in _GENERAL and not module.startswith(_MODELS)


def _texts_in(code: CodeType) -> Iterator[str]:
    """Yield the texts in code that are names, or may be pieces of names."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _texts_in(constant)
        elif isinstance(constant, str) and constant.replace(".", "_").isidentifier():
            yield constant
