"""The names of tensors in HF PEFT's files, without the prefix: of sites' parameters and of overrides."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn

from peftfx.bases.guests import own_modules
from peftfx.contract.override import SAVED, Override

_ROWS = ".token_adapter"  #: HF PEFT's layer around the trained rows of a tensor, under the module's path
BASE_LAYER = ".base_layer."  #: what follows a module's path in the names of tensors of the module that HF PEFT adapts
ORIGINAL = ".original_module."  #: the same for a module of which HF PEFT trains a copy
WRAPPERS = (f"{_ROWS}{BASE_LAYER}", ORIGINAL, BASE_LAYER)  #: what may stand for the dot before a tensor's last name


def name_of(path: str, suffix: str) -> str:
    """Return a tensor's name in a file, from its module `path` and its `suffix`."""
    return f"{path}.{suffix}".removeprefix(".")


def override_name(override: Override, adapted: set[str]) -> str:
    """Return HF PEFT's name of a copy of a tensor of the base: in an adapted module, the name of its `base_layer`.

    `adapted` has the paths of HF PEFT's layers; `PATH.token_adapter` is the one around trained rows.
    """
    name = override.key.removeprefix(f"{SAVED}.")
    path, _, leaf = name.rpartition(".")
    if override.rows:
        return f"{path}{_ROWS}.{leaf}"
    if f"{path}{_ROWS}" in adapted:
        return f"{path}{_ROWS}.base_layer.{leaf}"
    return f"{path}.base_layer.{leaf}" if path in adapted else name


def row_layers(overrides: Iterable[Override]) -> Iterator[str]:
    """Yield the paths of HF PEFT's layers around the rows that a rule trains."""
    for override in overrides:
        if override.rows:
            yield f"{override.key.removeprefix(f'{SAVED}.').rpartition('.')[0]}{_ROWS}"


def inner_layers(names: Iterable[str]) -> Iterator[str]:
    """Yield the paths of the modules around which the file's names say that HF PEFT has a layer."""
    for name in names:
        path, found, _ = name.partition(".base_layer.")
        if found:
            yield path


def module_of(name: str, marks: Iterable[str]) -> str:
    """Return the module path in a tensor's name, or the whole name if no mark of the method follows a path."""
    return re.split(rf"\.(?:{'|'.join(map(re.escape, ('base_layer', *marks)))})(?:\.|$)", name)[0]


def named_modules(names: Collection[str], base: nn.Module) -> frozenset[str]:
    """Return the paths of modules that the keys of a file name with a suffix of an adapter's own tensor."""
    modules = dict(own_modules(base))
    found = set()
    for name in names:
        parts = name.split(".")
        path = next((p for i in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:i])) in modules), None)
        if path is None:
            continue
        suffix = name.removeprefix(f"{path}.")
        if not suffix.startswith(_COPIES) and suffix not in {**modules[path]._parameters, **modules[path]._buffers}:
            found.add(path)
    return frozenset(found)


#: What follows a module's path in the names of copies of the base's own tensors.
_COPIES = ("base_layer.", "original_module.", "modules_to_save.", "token_adapter.")


def name_of_base(base: nn.Module) -> str | None:
    """Return the name or the path that a base was loaded by, if its config says it."""
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return str(name) if name else None  # diffusers keeps a Path


def own_memory(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name as a file needs them: a tensor that has several names is copied for each further one."""
    seen: set[int] = set()
    for key, value in named.items():
        yield key, value.detach().clone() if id(value) in seen else value.detach().contiguous()
        seen.add(id(value))
