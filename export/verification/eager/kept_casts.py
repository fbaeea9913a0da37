"""Casts that a capture lost: the graph computes in half precision what the model's own code computes in float32.

No comparison of outputs shows that: an operation in half precision is off by a few roundings, as are others. The dtypes
of the results show it. Both programs run the same call, and the results of each kind of operation are counted by their
dtypes. Programs whose outputs are equal to the bit round at the same places. If they are not, no kind may have fewer
results in float32, and more in half precision, than the model's code has. A graph with an operator that is not torch's
own, such as one for a whole loop, and that the code does not run, cannot be compared so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from peftfx.bases.dtypes import HALF_DTYPES
from peftfx.errors import PeftfxError
from peftfx.export.translation.between_casts import LOST_HINT
from peftfx.export.verification.comparison import Reference
from peftfx.export.verification.tolerances.tolerance import Tensors

#: Operations that make or move numbers, and compute none.
_MOVES = frozenset(
    {
        *("_to_copy", "copy_", "clone", "contiguous", "cat", "stack", "where", "masked_fill", "masked_fill_", "fill_"),
        *("index", "index_put", "index_put_", "index_select", "gather", "scatter", "masked_scatter", "embedding"),
        *("empty", "zeros", "ones", "full", "scalar_tensor", "arange", "empty_like", "zeros_like", "ones_like"),
        *("full_like", "new_empty", "new_zeros", "new_ones", "new_full", "constant_pad_nd", "_unsafe_view", "repeat"),
    }
)


class _Counts(TorchDispatchMode):
    """Counts the results of each kind of operation, in float32 and in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.half = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _MOVES:
            for value in pytree.tree_leaves(made):
                if isinstance(value, Tensor) and value.is_floating_point():
                    (self.half if value.dtype in HALF_DTYPES else self.wide)[name] += 1
        return made


def refuse_lost_casts(code: Reference, graph: Reference, call: Tensors, where: str) -> None:
    """Refuse a graph that computes in half precision what the model's own code computes in float32.

    Args:
        code: the model's own code, without adapters.
        graph: its captured graph.
        call: the inputs.
        where: what the message names.

    Raises:
        PeftfxError: a cast is lost.
    """
    counts = _Counts(), _Counts()
    with torch.no_grad():
        with counts[0]:
            want = code(call)
        with counts[1]:
            got = graph(call)
    if _equal(want, got):
        return
    own, captured = counts
    if any("::" in name for name in {*captured.wide, *captured.half} - {*own.wide, *own.half}):
        return
    lost = sorted(n for n in own.wide if captured.wide[n] < own.wide[n] and captured.half[n] > own.half[n])
    if lost:
        told = f"{', '.join(lost[:3])} in float32 in the model's code, in half precision in the graph"
        raise PeftfxError(f"a cast was lost in the capture: {told}", where, LOST_HINT)


def _equal(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> bool:
    shared = [(value, got[name]) for name, value in want.items() if name in got]
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in shared)
