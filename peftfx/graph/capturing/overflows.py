"""Overflows: code that limits numbers if some of them are infinite, as models do in float16.

    if not torch.isfinite(x).all():
        x = torch.clamp(x, min=-limit, max=limit)

A capture takes that side, and limits the numbers only in calls in which some are infinite. So the graph is right for
all calls. A branch in which the numbers are not limited by `clamp` is not known, and stays refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftfx.errors import CaptureError
from peftfx.graph.capturing.sizes.asking_code import raises_next

_TESTS = {torch.isfinite: False, Tensor.isfinite: False, torch.isinf: True, Tensor.isinf: True}
_JOINS = {torch.all: False, Tensor.all: False, torch.any: True, Tensor.any: True}
_CLAMPS = frozenset({torch.clamp, Tensor.clamp, torch.clip, Tensor.clip})
_FOLLOWED = frozenset({*_TESTS, *_JOINS, *_CLAMPS, Tensor.__bool__})


class limits_of_overflows(TorchFunctionMode):
    """A context in which a branch on infinite numbers is taken, and its limits act only on such numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._tests: dict[int, tuple[Tensor, Tensor, bool]] = {}  # kept, so that no other tensor gets their ids
        self._joined: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def __exit__(self, *raised: Any) -> None:
        """Leave the context.

        Raises:
            CaptureError: a branch was taken, and nothing was limited in it.
        """
        super().__exit__(*raised)
        if raised[0] is None and self._taken:
            what = (
                "cannot capture this model: its code branches on whether numbers are infinite, and does not clamp them"
            )
            raise CaptureError(what, hint="export it in float32")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Follow a tensor from its test for infinite numbers to a branch on the test, and to its clamp."""
        if func not in _FOLLOWED:
            return func(*args, **(kwargs or {}))
        named = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.__bool__ and id(first) in self._joined:
            _, tested, infinite = self._joined[id(first)]
            if raises_next(sys._getframe(1)):  # the code takes no infinite numbers
                return not infinite
            self._taken[id(tested)] = tested, first if infinite else ~first  # type: ignore[operator, assignment]
            return infinite
        made = func(*args, **named)
        if first is None or not isinstance(made, Tensor):
            return made
        if func in _TESTS:
            self._tests[id(made)] = made, first, _TESTS[func]
        elif func in _JOINS and len(args) == 1 and not named and id(first) in self._tests:
            _, tested, infinite = self._tests[id(first)]
            if _JOINS[func] == infinite:
                self._joined[id(made)] = made, tested, infinite
        elif func in _CLAMPS and id(first) in self._taken:
            return torch.where(self._taken.pop(id(first))[1], made, first)
        return made
