"""Sizes below zero: a tensor that fills up others has no size left where the call's own are too long.

`filling.expand(batch, most - length, width)` is refused by torch where `length` is more than `most`, but for one size,
-1, that means another. Torch keeps no guard of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from torch import fx

from peftfx.analysis.weight_ops import module_path
from peftfx.graph.capturing.sizes.size_conditions import Note

_EXPAND = torch.ops.aten.expand.default
_LARGEST = 1 << 20


def longest_filled(graph: fx.Graph) -> Iterator[Note]:
    """Yield the largest size of an axis for which no tensor is expanded to a size below 0, once for each such size."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _EXPAND:
            for size in node.args[1]:
                value = size.meta.get("val") if isinstance(size, fx.Node) else size
                expr = value.node.expr if isinstance(value, torch.SymInt) else None
                if expr is not None and (most := _most(expr)) is not None:
                    (symbol,) = expr.free_symbols
                    where = f"expand, in {module_path(node) or 'the model'}"
                    yield Note(symbol <= most, where, code=False, edge=False, text="", below=True)


def _most(expr: sympy.Basic) -> int | None:
    """Return the largest value of the only symbol for which an expression that falls with it is not below 0."""
    if len(expr.free_symbols) != 1:
        return None
    (symbol,) = expr.free_symbols

    def fits(value: int) -> bool:
        return bool(expr.xreplace({symbol: sympy.Integer(value)}) >= 0)

    low, high = 1, _LARGEST
    if not fits(low) or fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
