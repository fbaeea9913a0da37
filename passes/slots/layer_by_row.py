"""Compute a layer whose rows have adapters of their own, in plain torch; see `peftfx.passes.slots.layer`."""

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
BIAS_STACK = "bias"  #: the kind of a stack that replaces a layer's bias
_FLATTENS = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints})


def by_rows(site: Site, node: fx.Node, names: tuple[str, ...], low: bool, listed: bool) -> Callable[..., Tensor]:
    """Return a layer with an adapter for each row, as a function of (x, weight, bias, index, *names, *factors).

    The tensors after `index` are those of `names`, then the factors. If the layer reads the tokens of all rows on one
    axis (`listed`), the tokens are reshaped to [batch, tokens, in].
    """
    op = operation(node, site)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *given: Tensor) -> Tensor:
        shape = x.shape[:-1]
        x = x.reshape(index.shape[0], -1, x.shape[-1]) if listed else x
        own = dict(zip(names, given, strict=False))
        added = low_by_rows(site, op, x, index, *given[len(names) :]) if low else None
        y = acted(site, op, x, weight, bias, Effect(own.get(INNER), own.get(OUTER), added, own.get(BIAS_STACK)))
        return y.reshape(*shape, y.shape[-1]) if listed else y

    return forward


def low_by_rows(site: Site, op: Op, x: Tensor, index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the low-rank sum with each row's own factors; see `_Rows.factors`.

    A conv has one weight for all rows. So it is run with the factors of all adapters at once, and each row takes the
    channels of its own adapter.
    """
    if site.kind == "linear":
        return times(times(x, a), b)
    if site.kind == "embedding":
        first = (index * site.shape[0]).view(-1, *(1,) * (x.ndim - 1))
        return times(F.embedding(x + first, a), b)
    return (op(x, a).movedim(1, -1) @ b).movedim(-1, 1)


def each_token(x: Tensor, own: Tensor) -> Tensor:
    """Repeat each row's vector for all of the row's tokens in `x`, which are on one axis: see `lists_rows`.

    Args:
        x: [batch * tokens, ..., width].
        own: [batch, width].
    """
    count = x.reshape(own.shape[0], -1, *x.shape[1:]).shape[1]
    repeated = own.unsqueeze(1).expand(-1, count, -1).reshape(x.shape[0], -1)
    for _ in range(x.ndim - 2):
        repeated = repeated.unsqueeze(1)
    return repeated


def lists_rows(value: fx.Node, batch: fx.Node) -> bool:
    """Say whether a value has the tokens of all rows on its first axis, one row's behind the other's.

    It was flattened earlier from [batch, ...], as a list of tokens [batch * tokens, in], or the windows of images
    [batch * windows, tokens, in]. In between, each operation keeps the first axis.
    """
    length = str(value.meta["val"].shape[0])
    if length == str(batch.meta["val"].shape[0]):
        return False
    while True:
        before = value.args[0] if value.args else None
        if not isinstance(before, fx.Node) or not isinstance(before.meta.get("val"), Tensor):
            return False
        shape = before.meta["val"].shape
        if str(shape[:1]) != f"torch.Size([{length}])":
            break
        value = before
    return value.target in _FLATTENS and len(shape) > 2 and str(shape[0]) == str(batch.meta["val"].shape[0])
