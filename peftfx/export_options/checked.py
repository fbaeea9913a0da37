"""The base class of options, and how a function shows that it takes options by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Self, TypeVar

from peftfx.errors import PeftfxError, nearest, shown

Function = TypeVar("Function", bound=Callable[..., Any])


class Checked:
    """Options that are made from other options and changes to them."""

    @classmethod
    def of(cls, given: Self | None, changes: Mapping[str, object]) -> Self:
        """Return the `given` options with `changes`. Without options, the changes apply to the defaults.

        Raises:
            PeftfxError: `given` is of another class, an option does not exist, or the result makes no sense.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        wrong = next((name for name in changes if name not in known), None)
        if wrong is not None:
            raise PeftfxError(f"no option is named {wrong!r}", cls.__name__, nearest(wrong, known) or ", ".join(known))
        if given is None:
            return cls(**changes)
        if not isinstance(given, cls):
            hint = "pass options by name, as in view='decode'"
            raise PeftfxError(f"this is not of the class {cls.__name__}: {shown(given)}", "options", hint)
        return dataclasses.replace(given, **changes)  # type: ignore[type-var]


def check_task_id(task_id: int | None, adapters: Mapping[str, object]) -> None:
    """Refuse a task's number if no adapter is given."""
    if task_id is not None and not adapters:
        hint = "name the adapter, as in adapter='DIR' or --adapter DIR"
        raise PeftfxError(
            "task_id is the number of an adapter's task, but no adapter is given", f"task_id: {task_id}", hint
        )


def takes(options: type) -> Callable[[Function], Function]:
    """Show a function's `**changes` as the single options: in `help`, and in the hints of notebooks."""

    def mark(function: Function) -> Function:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=f.type)
            for f in fields(options)
        ]
        function.__signature__ = own.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
        return function

    return mark


def _default(option: dataclasses.Field[Any]) -> object:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
