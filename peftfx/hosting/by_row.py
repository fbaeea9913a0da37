"""Batches whose rows have different adapters: a hosting module runs once for each tuple of adapters, on their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftfx.errors import PeftfxError
from peftfx.hosting.call import CURRENT, acting, acting_by_row
from peftfx.hosting.guests import Hosted


def run_by_row(module: nn.Module, guests: Hosted, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """Run a module so that each row of its input has its own adapters.

    Raises:
        PeftfxError: the module is not a function of the rows of one tensor.
    """
    rows = CURRENT.rows
    assert rows is not None
    with acting_by_row(None):
        if not any(guests.hosts(keys) for keys, _ in rows):
            return module.forward(*args, **kwargs)
        count = sum(len(at) for _, at in rows)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(given) != 1 or not given[0].ndim or len(given[0]) != count:
            raise _refused(module, f"is not called with one tensor of {count} rows")
        whole: Tensor | None = None
        for keys, at in rows:
            at = at.to(given[0].device)
            some = [value[at] if value is given[0] else value for value in args]
            named = {name: value[at] if value is given[0] else value for name, value in kwargs.items()}
            with acting(keys):
                part = module.forward(*some, **named)
            if not isinstance(part, Tensor):
                raise _refused(module, f"returns a {type(part).__name__}, not one tensor")
            if whole is None:
                whole = part.new_empty((count, *part.shape[1:]))
            whole = whole.index_copy(0, at, part)
        return whole


def _refused(module: nn.Module, what: str) -> PeftfxError:
    hint = "call the model for the rows of each adapter by themselves"
    return PeftfxError(f"adapters of some rows act in a module that {what}", type(module).__name__, hint)
