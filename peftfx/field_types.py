"""Type checks of a dataclass's fields: whether the values have the types of the annotations."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import sys
import types
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peftfx.errors import PeftfxError, nearest, shown

_HINT = "give a value of the type in parentheses"
_LARGEST = (2 - 2**-23) * 2.0**127  #: of float32
_VALUES: Mapping[object, tuple[object, ...]] = {bool: (True, False), types.NoneType: (None,)}


def misfits(made: Any) -> list[str]:
    """Return a text such as `r='8' (int)` for each field whose value does not have the type of its annotation."""
    cls: Any = type(made)
    kinds = _kinds(cls)
    wrong = [f for f in fields(made) if not fits(getattr(made, f.name), kinds[f.name])]
    return [_told(f.name, getattr(made, f.name), f.type) for f in wrong]


def refuse_misfit_fields(made: Any) -> None:
    """Refuse a dataclass with a field whose value does not have the type of its annotation."""
    if wrong := misfits(made):
        raise PeftfxError(f"options have the wrong type: {', '.join(wrong)}", type(made).__name__, _HINT)


def refuse_unknown_choices(made: Any) -> None:
    """Refuse a dataclass with a text that is not among the choices of its field's annotation."""
    cls: Any = type(made)
    for name, kind in _kinds(cls).items():
        value, choices = getattr(made, name), list(_choices(kind))
        if isinstance(value, str) and choices and value not in choices:
            hint = nearest(value, [one for one in choices if isinstance(one, str)])
            listed = f"one of {', '.join(map(repr, choices))}"
            raise PeftfxError(f"unknown choice {shown(value)}", name, f"{hint}; {listed}" if hint else listed)


def _choices(kind: Any) -> Iterator[object]:
    """Return the values that a type lists, if the type accepts only listed texts; else nothing."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if str in kinds or not any(get_origin(one) is Literal for one in kinds):
        return
    for one in kinds:
        yield from get_args(one) if get_origin(one) is Literal else _VALUES.get(one, ())


def refuse_misfits(values: Mapping[str, object], kind: type, where: str) -> None:
    """Refuse values that do not have the types that a TypedDict has for their names."""
    kinds, told = _hints(kind), inspect.get_annotations(kind)
    wrong = [
        _told(n, v, getattr(told[n], "__forward_arg__", told[n])) for n, v in values.items() if not fits(v, kinds[n])
    ]
    if wrong:
        raise PeftfxError(f"options have the wrong type: {', '.join(wrong)}", where, _HINT)


def _told(name: str, value: object, kind: object) -> str:
    finite = not isinstance(value, float) or math.isfinite(value)
    return f"{name}={shown(value)} ({kind}{'' if finite else '; it must be finite'})"


def fits(value: object, kind: Any) -> bool:
    """Return whether a value has a type, with its items. A bool is not a number, and a number must be finite."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:  # only the type is checked here; `refuse_unknown_choices` checks the value
        return any(isinstance(value, type(one)) for one in inner)
    if kind in (None, types.NoneType):
        return value is None
    if kind is int:
        return _is_number(value, numbers.Integral)
    if kind is float:
        return _is_number(value, numbers.Real)
    outer = origin or kind
    if not isinstance(outer, type):
        return True
    if issubclass(outer, Mapping) and len(inner) == 2:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if issubclass(outer, Collection) and inner:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | Set):
            return False
        if inner[0] is str and {*map(type, value)} <= {str}:  # such a list can name each layer, for each layer anew
            return True
        return all(fits(item, inner[0]) for item in value)
    return isinstance(value, outer)


def _is_number(value: object, kind: type) -> bool:
    """Return whether a tensor can hold a value as a number of this kind; JSON has infinite and very large numbers."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if isinstance(value, numbers.Integral):
        return abs(int(value)) < 2**63
    return abs(value) <= _LARGEST  # type: ignore[arg-type]


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


@functools.cache
def _kinds(cls: Any) -> Mapping[str, Any]:
    """Return the type of each field; a type that cannot be evaluated in the class's module becomes `object`."""
    return {f.name: _kind(cls, f.name, f.type) for f in fields(cls)}


def _kind(cls: type, name: str, annotation: object) -> Any:
    if not isinstance(annotation, str):
        return annotation
    owner = next(one for one in cls.__mro__ if name in inspect.get_annotations(one))
    try:
        return eval(annotation, dict(vars(sys.modules[owner.__module__])))
    except (NameError, KeyError):
        return object
