"""Unreached modules: those that no call of the model can run, because no code that a call reaches ever names them.

A capture shows what one call runs, and never what another call might. The proof is by names: from the `forward` of each
class of the model, every function of the model's own files that the code names is followed, and the attribute names
that they all read are collected. A module whose name is not among them is an attribute that only other code reads: T5's
`shared`, which gives its weight to the embeddings of encoder and decoder as they are made, and is not called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType

from torch import nn

from peftfx.bases.guests import own_class, own_modules

#: Names by which code reaches submodules without naming them. Code that reads one of these proves nothing.
_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "__dict__"})
#: Libraries whose code knows no model's attributes by name, and what in them are models after all.
_GENERAL, _MODELS = ("torch", "numpy", "builtins", "transformers", "typing", "enum"), "transformers.models."


def is_unreached(base: nn.Module, path: str) -> bool:
    """Whether it is proven that no call of `base` runs the module at this path, or one that it is inside.

    False where there is no proof: the module may run, in another call or another mode.
    """
    try:
        names = _read_by_calls(base)
    except _Unknown:
        return False
    parts = path.split(".")
    return any(_is_unnamed(base, ".".join(parts[: depth + 1]), names) for depth in range(len(parts)))


def _is_unnamed(base: nn.Module, path: str, names: _Names) -> bool:
    """Whether nothing that was read names this module. One that a container of torch's holds is named by nobody."""
    owner, _, leaf = path.rpartition(".")
    if _is_general(type(base.get_submodule(owner)).__module__) or leaf in names.read:
        return False
    return not any(piece in leaf for piece in names.pieces) and _only_there(base, path)


@dataclass(frozen=True)
class _Names:
    """The names that some code reads, and pieces of those that it puts together: `getattr(self, f"layer{i}")`."""

    read: frozenset[str]
    pieces: frozenset[str]


def _only_there(base: nn.Module, path: str) -> bool:
    """Whether this is the module's only path: one that has another name too is reached by that."""
    module = base.get_submodule(path)
    inner = {id(m) for m in module.modules()}
    paths = [p for p, m in own_modules(base, remove_duplicate=False) if id(m) in inner]
    return all(p == path or p.startswith(f"{path}.") for p in paths)


class _Unknown(Exception):
    """Code was reached that may run any module."""


def _read_by_calls(base: nn.Module) -> _Names:
    """Every name that code reads which a call of the model can reach, as an attribute or as a text."""
    modules = [module for _, module in own_modules(base)]
    own = [f for m in modules for f in vars(m).values() if isinstance(f, (FunctionType, MethodType))]
    hooks = [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if any(not isinstance(h, (FunctionType, MethodType)) for h in hooks):
        raise _Unknown
    return _names_of(tuple(dict.fromkeys(own_class(m) for m in modules)), (*own, *hooks))


@functools.lru_cache(maxsize=8)
def _names_of(classes: tuple[type[nn.Module], ...], more: tuple[object, ...]) -> _Names:
    members = _members(classes)
    read, pieces, seen = set[str](), set[str](), set[int]()
    roots = [*(cls.forward for cls in classes), *more]
    todo = [f for root in roots for f in _functions(root)]
    while todo:
        function = todo.pop()
        if id(function.__code__) in seen:
            continue
        seen.add(id(function.__code__))
        names, texts = set(_names_in(function.__code__)), set(_texts_in(function.__code__))
        computed = bool(names & {"getattr", "attrgetter", "__getattr__"})
        if names & _WALKS or (computed and not texts):
            raise _Unknown
        pieces |= texts if computed else set()
        todo += [f for name in names - read for member in members.get(name, ()) for f in _functions(member)]
        todo += [f for name in names for f in _functions(function.__globals__.get(name))]
        read |= names
    return _Names(frozenset(read), frozenset(pieces))


def _members(classes: Iterable[type]) -> dict[str, list[object]]:
    """What the classes of the model define under each name, torch's own left out."""
    owners = dict.fromkeys(owner for cls in classes for owner in cls.__mro__ if not _is_general(owner.__module__))
    found: dict[str, list[object]] = {}
    for owner in owners:
        for name, value in vars(owner).items():
            found.setdefault(name, []).append(value)
    return found


def _functions(value: object) -> Iterator[FunctionType]:
    """The Python functions that using this value may run: its own, what it wraps, and a class's methods."""
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


def _names_in(code: CodeType) -> Iterator[str]:
    """Names that code reads: attributes, globals, imports."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _texts_in(code: CodeType) -> Iterator[str]:
    """Texts in code that are names, or may be pieces of names."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _texts_in(constant)
        elif isinstance(constant, str) and constant.replace(".", "_").isidentifier():
            yield constant
