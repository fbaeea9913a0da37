"""by_rows: a layer whose rows have an adapter of their own, as plain torch; see `peftfx.passes.slots.layer`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from peftfx.contract.method import Op
from peftfx.graph.slots import INNER, OUTER
from peftfx.passes.slots.layer import Effect, acted, operation, times
from peftfx.sites.site import Site

aten = torch.ops.aten
BIAS_STACK = "bias"  #: of a stack: what takes the place of a layer's bias
_FLATTENS = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints})


def by_rows(site: Site, node: fx.Node, names: tuple[str, ...], low: bool, listed: bool) -> Callable[..., Tensor]:
    """A layer whose rows have their own, as a function of (x, weight, bias, index, *those of `names`, *factors).

    One that reads the tokens of all rows as a list, `listed`, is given them row by row: [batch, tokens, in].
    """
    op = operation(node, site)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *given: Tensor) -> Tensor:
        x = x.reshape(index.shape[0], -1, x.shape[-1]) if listed else x
        own = dict(zip(names, given, strict=False))
        added = low_by_rows(site, op, x, index, *given[len(names) :]) if low else None
        y = acted(site, op, x, weight, bias, Effect(own.get(INNER), own.get(OUTER), added, own.get(BIAS_STACK)))
        return y.reshape(-1, y.shape[-1]) if listed else y

    return forward


def low_by_rows(site: Site, op: Op, x: Tensor, index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The low-rank sum of each row's own factors; see `_Rows.factors`.

    Of a conv, which has one weight for all, all adapters' factors are one, and each row takes what its own give.
    """
    if site.kind == "linear":
        return times(times(x, a), b)
    if site.kind == "embedding":
        first = (index * site.shape[0]).view(-1, *(1,) * (x.ndim - 1))
        return times(F.embedding(x + first, a), b)
    return (op(x, a).movedim(1, -1) @ b).movedim(-1, 1)


def lists_rows(value: fx.Node, batch: fx.Node) -> bool:
    """Whether a value is a list of tokens, [batch * tokens, in], flattened from [batch, tokens, ...] before it."""
    length = str(value.meta["val"].shape[0])
    if length == str(batch.meta["val"].shape[0]):
        return False
    while value.target not in _FLATTENS:
        before = value.args[0] if value.args else None
        if not isinstance(before, fx.Node) or str(before.meta["val"].shape[:1]) != f"torch.Size([{length}])":
            return False
        value = before
    (source, *_) = value.all_input_nodes
    whole = source.meta["val"].shape
    return len(whole) > 2 and str(whole[0]) == str(batch.meta["val"].shape[0])
