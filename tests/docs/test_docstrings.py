"""Each public name says what it is, and what its arguments are."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import pytest

import peftfx
from peftfx.contract.method import Method
from peftfx.export_options.adapter import AdapterOptions
from peftfx.export_options.export import ExportOptions
from peftfx.model.adapted import AdaptedModel

#: By name, and as a whole: what these take is told by their own classes.
OPTIONS = frozenset(f.name for cls in (ExportOptions, AdapterOptions) for f in dataclasses.fields(cls))
#: What trainers call, with arguments of their own.
CALLED_BY_OTHERS = frozenset({"on_log", "on_optimizer_step", "on_train_begin", "on_step_end", "graph_of_call"})


def public() -> Iterator[tuple[str, object]]:
    """The names of `peftfx`, the functions of its classes, and those that an adapted model inherits."""
    for name in peftfx.__all__:
        if inspect.isclass(made := getattr(peftfx, name)) or inspect.isfunction(made):
            yield name, made
        if inspect.isclass(made) and not issubclass(made, Method):
            yield from _functions(made)
    for cls in AdaptedModel.__mro__[1:]:
        if cls.__module__.startswith("peftfx."):
            yield from _functions(cls)


def _functions(cls: type) -> Iterator[tuple[str, object]]:
    for name, made in vars(cls).items():
        told = inspect.isfunction(made) and not getattr(made, "__isabstractmethod__", False)
        if told and not name.startswith("_") and name not in CALLED_BY_OTHERS:
            yield f"{cls.__name__}.{name}", made


def arguments(made: object) -> list[str]:
    """What a user gives it."""
    if inspect.isclass(made):
        return [f.name for f in dataclasses.fields(made)] if dataclasses.is_dataclass(made) else []
    return [name for name in inspect.signature(made).parameters if name not in OPTIONS | {"self", "args", "kwargs"}]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "made"), [pytest.param(n, m, id=n) for n, m in dict(public()).items()])
def test_it_says_what_it_is_and_what_it_takes(name: str, made: object) -> None:
    classes = made.__mro__[:-1] if inspect.isclass(made) else (made,)
    texts = [inspect.cleandoc(one.__doc__) for one in classes if one.__doc__]  # a method's options are its bases', too
    assert texts, name
    assert not texts[0].startswith(f"{name}("), "a dataclass's own text is no docstring"
    lost = [one for one in arguments(made) if not re.search(rf"\b{one}\b", "\n".join(texts))]
    assert lost == [], f"{name} does not tell of {lost}"
