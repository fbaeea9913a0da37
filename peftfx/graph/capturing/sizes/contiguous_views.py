"""Views of contiguous tensors in a capture: their strides are known, so torch need not search for them.

torch's reference of a view joins and splits one axis after the other, and asks of each whether it divides the next. A
view of a contiguous tensor is contiguous, whatever its shape. Where a size is computed from others by more than
products, torch does not know that it is not 0, and would ask this of the strides: there it searches, as ever.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import sympy
import torch
from torch import SymInt, Tensor, _refs
from torch._prims_common import is_contiguous_or_false

_SEARCH = "_reshape_view_helper_core_alg"  #: torch's function that searches for the strides, after it compared sizes


@contextmanager
def contiguous_views() -> Iterator[None]:
    """Make views of contiguous tensors without a search, in this thread."""
    own, search = threading.get_ident(), getattr(_refs, _SEARCH)

    def viewed(value: Tensor, shape: list[int] | tuple[int, ...], allow_copy: bool) -> Tensor:
        if threading.get_ident() == own and _plain((*value.shape, *shape)) and is_contiguous_or_false(value):
            strides = [*accumulate(reversed(shape[1:]), operator.mul, initial=1)][::-1]
            return torch.as_strided(value, shape, strides)
        return search(value, shape, allow_copy)

    setattr(_refs, _SEARCH, viewed)
    try:
        yield
    finally:
        setattr(_refs, _SEARCH, search)


def _plain(sizes: tuple[int | SymInt, ...]) -> bool:
    """Return whether sizes are numbers, sizes of inputs, or products of these."""
    return all(_is_product(size.node.expr) for size in sizes if isinstance(size, SymInt))


@functools.lru_cache(4096)
def _is_product(expression: sympy.Expr) -> bool:
    return all(factor.is_Symbol or factor.is_Integer for factor in sympy.Mul.make_args(expression))
