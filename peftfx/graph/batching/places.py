"""Operators on places that indices name, run for several examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx.graph.batching.several import Arguments, Several, aten, count_of, not_batched, several_of


def picked(op: Any, given: Arguments, made: Any) -> Any:
    """Pick elements by tensors of indices, one for each of some axes that are next to each other."""
    one, indices = given["self"], list(given["indices"])
    places = [i for i, index in enumerate(indices) if index is not None]
    apart = places != list(range(places[0], places[-1] + 1))
    several = [index for index in indices if isinstance(index, Several)]
    if apart or (several and isinstance(one, Several)):
        return _picked_by_each(op, several_of(one, count_of(given)), indices, places, apart)
    if any(v.value.dtype == torch.bool for v in several):
        raise not_batched(str(op))
    if not several:
        return op(one.value, [None, *indices])
    if places[0] != 0:
        raise not_batched(str(op))
    rank = max(v.rank if isinstance(v, Several) else v.ndim for v in indices if v is not None)
    return op(one, [v.padded(rank) if isinstance(v, Several) else v for v in indices])


def _picked_by_each(op: Any, one: Several, indices: Sequence[Any], places: Sequence[int], apart: bool) -> Tensor:
    """Pick in each example by its own indices for the first axes."""
    given = [index for index in indices if index is not None]
    whole = all(v.value.dtype == torch.int64 if isinstance(v, Several) else v.dtype == torch.int64 for v in given)
    if apart or places[0] != 0 or not whole:
        raise not_batched(str(op))
    rank = max(v.rank if isinstance(v, Several) else v.ndim for v in given)
    numbers = aten.reshape.default(aten.arange.default(one.count, device=one.value.device), [-1, *[1] * rank])
    return op(one.value, [numbers, *(v.padded(rank) if isinstance(v, Several) else v for v in given)])


def put(op: Any, given: Arguments, made: Any) -> Any:
    """Put values at places that are the same in each example."""
    one, indices, values = given["self"], list(given["indices"]), given["values"]
    if not isinstance(one, Several) or any(isinstance(index, Several) for index in indices):
        raise not_batched(str(op))
    places = [i for i, index in enumerate(indices) if index is not None]
    if places != list(range(places[0], places[-1] + 1)):
        raise not_batched(str(op))
    if isinstance(values, Several):  # of the shape of what is replaced
        by = [index for index in indices if index is not None]
        if any(index.dtype == torch.bool for index in by):
            raise not_batched(str(op))
        values = values.padded(one.rank - len(by) + max(index.ndim for index in by))
    return op(one.value, [None, *indices], values, *[given["accumulate"]])
