"""Names of tensors in HF PEFT's files, without the prefix: what a module path, a suffix, an override become there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.override import SAVED, Override


def name_of(path: str, suffix: str) -> str:
    """A tensor's name in a file."""
    return f"{path}.{suffix}".removeprefix(".")


def override_name(override: Override, adapted: set[str]) -> str:
    """The name HF PEFT gives a trained tensor of the base: one of an adapted module is its `base_layer`'s."""
    name = override.key.removeprefix(f"{SAVED}.")
    path, _, leaf = name.rpartition(".")
    if override.rows:
        return f"{path}.token_adapter.{leaf}"
    return f"{path}.base_layer.{leaf}" if path in adapted else name


def module_of(name: str, marks: Iterable[str]) -> str:
    """The module path in a name; the name itself where no mark of the method's suffixes follows a path."""
    return re.split(rf"\.(?:{'|'.join(map(re.escape, ('base_layer', *marks)))})(?:\.|$)", name)[0]


def named_modules(names: Collection[str], base: nn.Module) -> frozenset[str]:
    """The modules that the keys of a file name by something that is the adapter's own, sites or not."""
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


#: How the names of copies of the base's own tensors go on behind a module's path.
_COPIES = ("base_layer.", "original_module.", "modules_to_save.", "token_adapter.")
