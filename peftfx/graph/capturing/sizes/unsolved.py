"""Unsolved equalities: a statement that fixes a size by divisions within divisions, which torch.export cannot solve.

It would end the capture. Left out, it stays a condition of the graph, as each statement does, and the axis stays free.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sympy
from torch.fx.experimental.symbolic_shapes import DimConstraints
from torch.utils._sympy.functions import FloorDiv


@contextmanager
def unsolved_left_out() -> Iterator[None]:
    """Keep torch.export from equalities that it cannot solve, in this thread. Not for two threads at once."""
    own, add = threading.get_ident(), DimConstraints.add

    def added(self: DimConstraints, statement: sympy.Basic) -> bool:
        if threading.get_ident() == own and _is_unsolved(self, statement):
            return False
        return add(self, statement)

    DimConstraints.add = added  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DimConstraints.add = add  # type: ignore[method-assign]


def _is_unsolved(constraints: DimConstraints, statement: sympy.Basic) -> bool:
    """Return whether a division is left in an equality about one size after torch has taken divisions out."""
    if not isinstance(statement, sympy.Eq) or len(statement.free_symbols) != 1:
        return False
    (size,) = statement.free_symbols
    before = set(constraints._congruences[size])
    left: sympy.Basic = constraints.rewrite_with_congruences(size, statement)
    constraints._congruences[size] = before
    return bool(left.has(FloorDiv))
