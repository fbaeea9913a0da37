"""The methods, one file each. A file in this folder that defines a `Method` is all it takes to add one."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError, nearest


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Every method in this folder, by its HF PEFT type (`LORA`)."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        home = importlib.import_module(f"{__name__}.{module.name}")
        for value in vars(home).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == home.__name__:
                found[value.peft_type] = value
    return found


def method_named(peft_type: str) -> type[Method]:
    """The method of this HF PEFT type; unknown ones are an error that names those there are."""
    known = methods()
    if peft_type not in known:
        names = ", ".join(sorted(known))
        hint = nearest(peft_type, known) or f"methods that peftfx knows: {names}"
        raise PeftfxError(f"unknown method {peft_type!r}", "peft_type", hint)
    return known[peft_type]
