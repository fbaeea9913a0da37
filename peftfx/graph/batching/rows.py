"""Operators on rows, run for several examples: the rows of all examples are put one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftfx.graph.batching.several import (
    Arguments,
    BatchRule,
    Several,
    as_tensors,
    aten,
    count_of,
    not_batched,
    several_of,
    tensors_of,
)


def with_joined_rows(axes: int) -> BatchRule:
    """Return the rule for an operator on values with rows first, [rows, ...] of so many axes: the examples' rows are
    put one after the other.
    """

    def run(op: Any, given: Arguments, made: Any) -> Any:
        first, *rest = tensors_of(given.values())
        if not isinstance(first, Several) or any(isinstance(value, Several) for value in rest):
            raise not_batched(str(op))
        if first.rank == axes - 1:  # one row without an axis: the examples are the rows
            return op(**as_tensors(given))
        if first.rank != axes:
            raise not_batched(str(op))
        return _joined(op, given, made)

    return run


def normalised(op: Any, given: Arguments, made: Any) -> Any:
    """Normalise each row by itself, or by numbers that are known, [rows, channels, ...]."""
    if given.get("training"):
        raise not_batched(str(op))  # the rows' own numbers
    if isinstance(given["input"], Several) and not any(isinstance(v, Several) for v in list(given.values())[1:]):
        return _joined(op, given, made)
    raise not_batched(str(op))


def sampled(op: Any, given: Arguments, made: Any) -> Any:
    """Sample rows at places, [rows, channels, ...] at [rows, ..., places]."""
    count = count_of(given)
    return _joined(op, {n: several_of(v, count) if isinstance(v, Tensor) else v for n, v in given.items()}, made)


def _joined(op: Any, given: Arguments, made: Any) -> Any:
    joined = {n: aten.flatten.using_ints(v.value, 0, 1) if isinstance(v, Several) else v for n, v in given.items()}
    return aten.reshape.default(op(**joined), [count_of(given), *made.shape])


def attended_within(op: Any, given: Arguments, made: Any) -> Any:
    """Attend within each example: queries, keys and values are [rows, heads, length, width] or without rows."""
    count = count_of(given)
    q, k, v = (several_of(given[name], count) for name in ("query", "key", "value"))
    mask = given.get("attn_mask")
    if q.rank not in (3, 4) or {k.rank, v.rank} != {q.rank}:
        raise not_batched(str(op))
    if q.rank == 3:
        if mask is not None:
            mask = mask.padded(3) if isinstance(mask, Several) else mask
        return op(**{**given, "query": q.value, "key": k.value, "value": v.value, "attn_mask": mask})
    rows = q.one[0]
    if mask is not None and (isinstance(mask, Several) or (mask.ndim == 4 and mask.shape[0] > 1)):
        mask = several_of(mask, count)
        each = mask.padded(4)
        each = aten.expand.default(each, [count, rows, *each.shape[2:]])
        mask = aten.reshape.default(each, [count * rows, *each.shape[2:]])
    joined = {n: aten.flatten.using_ints(t.value, 0, 1) for n, t in (("query", q), ("key", k), ("value", v))}
    return aten.reshape.default(op(**{**given, **joined, "attn_mask": mask}), [count, *made.shape])
