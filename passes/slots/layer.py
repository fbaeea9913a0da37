"""Compute a layer with an adapter in plain torch: `op(x * inner, W) * outer + low + b`, or `op` if nothing acts.

`low` is the low-rank sum. At a linear layer it is `(x A) B`. At other layers it is the layer's own operation with `A`
in place of `W`, followed by a product with `B`. `Open` and `ByRow` trace these functions. Their tensors hold for a
whole call, or have an entry for each row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx

from peftfx.contract.method import Op
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.site_op import bind, weight_and_bias
from peftfx.sites.site import Call, Site


@dataclass(frozen=True)
class Effect:
    """The tensors that act at a call. A tensor that is None has no effect.

    Attributes:
        inner, outer: the scales of the layer's input, and of its output without the bias.
        low: the low-rank sum.
        bias: replaces the layer's own bias.
    """

    inner: Tensor | None = None
    outer: Tensor | None = None
    low: Tensor | None = None
    bias: Tensor | None = None


def acted(site: Site, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, acting: Effect) -> Tensor:
    """Compute a layer's output with adapters. `weight` has the layout that `op` takes, see `operation`."""
    y = op(x if acting.inner is None else x * _along_channels(acting.inner, site), weight)
    if acting.outer is not None:
        y = y * _along_channels(acting.outer, site)
    if acting.low is not None:
        y = y + acting.low
    own = bias if acting.bias is None else acting.bias
    return y if own is None else y + _along_channels(own, site)


def operation(op: fx.Node, site: Site) -> Op:
    """Return a layer's operation on its stored weight. A weight [in, out] is used in that layout, not transposed."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ weight

    return product if site.kind == "linear" and site.transposed else bind(op, site)


def low_rank(site: Site, op: Op, node: fx.Node, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the low-rank sum of factors in slots: [in, r] and [r, out]; for a conv, the weights of two convs."""
    if site.kind == "conv":
        return node.target.overloadpacket.default(op(x, a), b)  # type: ignore[union-attr]
    return times(F.embedding(x, a) if site.kind == "embedding" else times(x, a), b)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Compute a product. If each row of features has a factor of its own, the row is a matrix of one row."""
    return (x.unsqueeze(-2) @ factor).squeeze(-2) if x.ndim < factor.ndim else x @ factor


def _along_channels(vector: Tensor, site: Site) -> Tensor:
    """Add axes to a vector over a site's channels, so that it broadcasts; for a conv, one for each space axis."""
    for _ in range(len(site.shape) - 2 if site.kind == "conv" else 0):
        vector = vector.unsqueeze(-1)
    return vector


class Layers:
    """A graph whose layers are changed, one call after another.

    Attributes:
        nodes: the nodes by name. A changed layer's new output has the name of its old output, since later layers may
            read it.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.nodes = {node.name: node for node in rewriter.graph.nodes}

    def act(self, site: Site, call: Call, key: object, function: Callable[..., Tensor], *given: fx.Node) -> None:
        """Replace a layer's call by a function of (x, weight, bias, *given), traced once for each key and signature."""
        op, x, y = (self.nodes[name] for name in (call.op, call.x, call.y))
        weight, bias = weight_and_bias(site, call, self.nodes)
        fixed = [a for a in op.args if not isinstance(a, fx.Node)]
        alike = dataclasses.replace(site, path="", role="", layer=None, weight="", bias=None, parts=(), calls=())
        users = list(y.users)
        result = self.rewriter.after(y).trace(
            function, x, weight, bias, *given, key=(key, alike, op.target, fixed), what="what acts", where=site.path
        )
        self.rewriter.replace(y, result, users)
        self.nodes[call.y] = result

    def has_one_dtype(self, site: Site) -> bool:
        """Say whether a site's values have the dtype of its weight. If a layer casts, no single slot fits."""
        if site.kind == "embedding":
            return True
        values = [self.nodes[name] for call in site.calls for name in (call.x, call.op, call.y)]
        values += [weight_and_bias(site, call, self.nodes)[0] for call in site.calls]
        return len({value.meta["val"].dtype for value in values}) == 1
