"""Several: one value of a program for each of several examples, in one tensor with a first axis for the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError

aten = torch.ops.aten

Arguments = dict[str, Any]
BatchRule = Callable[[Any, Arguments, Any], Any]
"""A function that runs an operator for several examples: it takes the operator, its arguments by name, some of them
`Several`, and the fake results for one example; it returns tensors with a first axis for the examples."""


@dataclass(frozen=True, eq=False)
class Several:
    """The values of one tensor of a program for each example.

    Attributes:
        value: the values, [examples, *the shape for one example].
    """

    value: Tensor

    @property
    def rank(self) -> int:
        """The number of axes for one example."""
        return self.value.ndim - 1

    @property
    def count(self) -> int | SymInt:
        """The number of examples."""
        return self.value.shape[0]

    @property
    def one(self) -> tuple[int, ...]:
        """The shape for one example."""
        return tuple(self.value.shape[1:])

    def shaped(self, shape: Sequence[int]) -> Tensor:
        """Return the values in another shape for one example."""
        return self.value if self.one == tuple(shape) else aten.reshape.default(self.value, [self.count, *shape])

    def padded(self, rank: int) -> Tensor:
        """Return the values with as many axes for one example; the new axes are the first, of size 1."""
        return self.shaped((*[1] * (rank - self.rank), *self.one))


def several_of(value: Any, count: int | SymInt) -> Several:
    """Return a value for each of so many examples, given that, or one value for all of them."""
    if isinstance(value, Several):
        return value
    return Several(aten.expand.default(aten.unsqueeze.default(value, 0), [count, *value.shape]))


def not_batched(name: str) -> PeftfxError:
    """Return the error for an operator that is not run for several examples at once."""
    what = f"the operator {name} of the image encoder cannot be run for several images at once"
    return PeftfxError(what, name, "export the decode view, which encodes one image at a time")


def tensors_of(values: Iterable[Any]) -> list[Any]:
    """Return the tensors in arguments, those for each example and those for all."""
    leaves = pytree.tree_leaves(list(values), is_leaf=lambda v: isinstance(v, Several))
    return [leaf for leaf in leaves if isinstance(leaf, Several | Tensor)]


def count_of(given: Mapping[str, Any]) -> Any:
    """Return the number of examples."""
    return next(v for v in tensors_of(given.values()) if isinstance(v, Several)).count


def own(given: Arguments) -> Several:
    """Return the first argument, which has a value for each example."""
    one = next(iter(given.values()))
    if not isinstance(one, Several):
        raise not_batched("that gives values another shape")
    return one


def as_tensors(given: Arguments) -> Arguments:
    """Return the arguments as tensors, those for each example with their first axis."""
    return {
        name: pytree.tree_map(
            lambda v: v.value if isinstance(v, Several) else v, value, is_leaf=lambda v: isinstance(v, Several)
        )
        for name, value in given.items()
    }


def all_several(value: Any, count: Any) -> Any:
    """Return an argument with a value for each example in place of every tensor in it."""
    if isinstance(value, list | tuple):
        return [all_several(item, count) for item in value]
    return several_of(value, count) if isinstance(value, Tensor) else value
