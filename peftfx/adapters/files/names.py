"""Names of tensors in HF PEFT's files, without the prefix: what a module path, a suffix, an override become there."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peftfx.contract.placement import SAVED, Override


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
