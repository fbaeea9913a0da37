"""Views of contiguous tensors in a capture: their strides are known, so torch need not search for them.

torch's reference of a view joins and splits one axis after the other, and asks of each whether it divides the next. A
view of a contiguous tensor is contiguous, whatever its shape.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, _refs
from torch._prims_common import is_contiguous_or_false

_SEARCH = "_reshape_view_helper_core_alg"  #: torch's function that searches for the strides, after it compared sizes


@contextmanager
def contiguous_views() -> Iterator[None]:
    """Make views of contiguous tensors without a search, in this thread."""
    own, search = threading.get_ident(), getattr(_refs, _SEARCH)

    def viewed(value: Tensor, shape: list[int] | tuple[int, ...], allow_copy: bool) -> Tensor:
        if threading.get_ident() == own and is_contiguous_or_false(value):
            strides = [*accumulate(reversed(shape[1:]), operator.mul, initial=1)][::-1]  # no axis is empty here
            return torch.as_strided(value, shape, strides)
        return search(value, shape, allow_copy)  # type: ignore[no-any-return]

    setattr(_refs, _SEARCH, viewed)
    try:
        yield
    finally:
        setattr(_refs, _SEARCH, search)
