"""Places: the attributes that hold modules. A place is an attribute of the holding module, and has one name.

One module may be held in several places. One place may have several paths, if a module that contains it is held in
several places. HF PEFT replaces the module in one place: all paths to that place then run the adapter, and no other
place does.
"""

from __future__ import annotations

import copy
import functools
import re

from torch import Tensor, fx, nn

from peftfx.graph.graph import BASE

WRAPPED = "_checkpoint_wrapped_module"  #: the child of torch's `checkpoint_wrapper` that is the module it wraps
_CUT = re.compile(r"\.slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)(?:\.(?P<leaf>[^.]+))?")


def places_of(base: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for the path of each module that is held in several places, the names of all, the path's own first.

    The path is the module's first path in `named_modules`, which is the path that HF PEFT knows.
    """
    first = _first_paths(base)
    held: dict[str, list[str]] = {}
    for path, module in base.named_modules():
        for leaf, child in module._modules.items():
            if child is not None:
                held.setdefault(first[id(child)], []).append(f"{path}.{leaf}".removeprefix("."))
    return {path: tuple(names) for path, names in held.items() if len(names) > 1}


def unwrapped(path: str) -> str:
    """Return the path that a module or a tensor has without torch's wrappers for checkpointing."""
    return f"{path}.".replace(f"{WRAPPED}.", "")[:-1]


def above(path: str) -> list[str]:
    """Return the paths of the modules that contain what is at this path, from the outermost inwards."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def has_module(base: nn.Module, path: str) -> bool:
    """Return whether the base has a module at this path. There may be a weight, such as experts', instead."""
    return module_at(base, path) is not None


def module_at(base: nn.Module, path: str) -> nn.Module | None:
    """Return the base's module at this path, or None."""
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


def owns_weight(base: nn.Module, path: str) -> bool:
    """Return whether the base has a module at this path with a parameter `weight` of its own."""
    module = module_at(base, path)
    return module is not None and isinstance(module._parameters.get("weight"), Tensor)


def twin(module: nn.Module) -> nn.Module:
    """Return a copy of a module and of the modules in it, with the same tensors, hooks and attributes."""
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in made:
        copied = made[id(module)] = copy.copy(module)
        for name, value in vars(copied).items():
            if isinstance(value, dict):
                object.__setattr__(copied, name, copy.copy(value))
        inner = {n: None if child is None else _twin(child, made) for n, child in module._modules.items()}
        object.__setattr__(copied, "_modules", inner)
    return made[id(module)]


def name_places(module: fx.GraphModule, base: nn.Module) -> None:
    """Write the names of places into the metadata of a graph captured from `base`, in place of its paths."""
    renamed = _renamed(base)

    @functools.cache
    def name(path: str) -> str:
        own, mark, call = path.partition("@")
        own = whole_path(own, base)
        return f"{renamed.get(own, own)}{mark}{call}"

    for inner in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in inner.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                node.meta["nn_module_stack"] = {k: (name(path), *more) for k, (path, *more) in stack.items()}


def whole_path(path: str, base: nn.Module) -> str:
    """Return the path in the whole list for a path through a slice of a list, which code makes as it runs.

    torch.export writes `layers.slice(1, 3, None).0` for the first module of `layers[1:3]`. A slice of a list counts
    from 0 again; a slice of an `nn.Sequential` keeps the names.
    """
    while cut := _CUT.search(path):
        held, leaf = path[: cut.start()], cut["leaf"]
        modules = base.get_submodule(held.removeprefix(BASE).removeprefix("."))
        if leaf is not None and not isinstance(modules, nn.Sequential):
            start, stop, step = (None if bound == "None" else int(bound) for bound in cut.group(1, 2, 3))
            leaf = list(modules._modules)[start:stop:step][int(leaf)]
        path = ".".join(filter(None, (held, leaf))) + path[cut.end() :]
    return path


def _renamed(base: nn.Module) -> dict[str, str]:
    """Return, for each path of a graph into the base that is not its place's name, that name."""
    first, modules = _first_paths(base), dict(base.named_modules(remove_duplicate=False))
    found = {}
    for path in filter(None, modules):
        owner, _, leaf = path.rpartition(".")
        name = unwrapped(f"{first[id(modules[owner])]}.{leaf}".removeprefix("."))
        if name != path:
            found[f"{BASE}.{path}"] = f"{BASE}.{name}"
    return found


def _first_paths(base: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in base.named_modules()}
