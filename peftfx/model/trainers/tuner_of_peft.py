"""The class `TunerOfPeft`: the base's inner model, with the method by which code for HF PEFT gives out ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn


class _Allocates(Protocol):
    """The part of an adapted model that code for HF PEFT asks its `base_model` for."""

    @property
    def peft_config(self) -> Mapping[str, object]: ...
    def update_and_allocate(self, global_step: int) -> None: ...


_OF_PEFT = frozenset({"update_and_allocate", "peft_config"})


class TunerOfPeft:
    """The inner model of a base, which has `update_and_allocate` and `peft_config` of the adapted model, too.

    In HF PEFT, `base_model` is the tuner: training loops and callbacks call its `update_and_allocate`, and leave it out
    without a word if there is none. All else is the inner model's own.

    Args:
        inner: the base's own `base_model`, or the base if it has none.
        adapted: the adapted model.
    """

    def __init__(self, inner: nn.Module, adapted: _Allocates) -> None:
        self.__dict__.update(_inner=inner, _adapted=adapted)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_inner"])

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_adapted" if name in _OF_PEFT else "_inner"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_inner"], name, value)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.__dict__["_inner"](*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.__dict__["_inner"])
