"""Lower bounds of options, refused in the same words by all methods."""

from __future__ import annotations

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError


def refuse_below(least: int, method: Method, *names: str) -> None:
    """Refuse a method if one of its options `names` is below `least`. The hint has the option's default.

    Raises:
        PeftfxError: names the option and its value.
    """
    cls = type(method)
    for name in names:
        value = getattr(method, name)
        if value < least:
            hint = f"{cls.__name__}({name}={getattr(cls, name)})"
            raise PeftfxError(f"{name} must be {least} or more, not {value}", name, hint)
