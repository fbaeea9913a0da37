"""What acts at a layer, as plain torch: `op(x * inner, W) * outer + low + b`, which is `op` itself where nothing acts.

`low` is the low-rank sum: `(x A) B` at a linear layer, and at another the layer's own operation with `A` in the place
of `W`, and behind it a product with `B`. `Open` and `ByRow` trace these functions; their tensors are one for a whole
call, or have one for each of its rows.
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
    """What acts at a call; what is None does nothing.

    Attributes:
        inner, outer: scales of the layer's input, and of its output without the bias.
        low: the low-rank sum.
        bias: in the place of the layer's own.
    """

    inner: Tensor | None = None
    outer: Tensor | None = None
    low: Tensor | None = None
    bias: Tensor | None = None


def acted(site: Site, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, acting: Effect) -> Tensor:
    """What a layer gives; `weight` is as `op` takes it, see `operation`."""
    y = op(x if acting.inner is None else x * _along_channels(acting.inner, site), weight)
    if acting.outer is not None:
        y = y * _along_channels(acting.outer, site)
    if acting.low is not None:
        y = y + acting.low
    own = bias if acting.bias is None else acting.bias
    return y if own is None else y + _along_channels(own, site)


def operation(op: fx.Node, site: Site) -> Op:
    """A layer's operation on its weight as it is stored: a weight [in, out] is read so, and not turned first."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ weight

    return product if site.kind == "linear" and site.transposed else bind(op, site)


def low_rank(site: Site, op: Op, node: fx.Node, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The low-rank sum of factors as a slot has them: [in, r] and [r, out]; of a conv, the weights of two convs."""
    if site.kind == "conv":
        return node.target.overloadpacket.default(op(x, a), b)  # type: ignore[union-attr, no-any-return]
    return times(F.embedding(x, a) if site.kind == "embedding" else times(x, a), b)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """A product; a row of features that has a factor of its own is a matrix of one row."""
    return (x.unsqueeze(-2) @ factor).squeeze(-2) if x.ndim < factor.ndim else x @ factor


def _along_channels(vector: Tensor, site: Site) -> Tensor:
    """A vector of a site's inputs or outputs, of each row perhaps; for a conv with an axis for each of its space."""
    for _ in range(len(site.shape) - 2 if site.kind == "conv" else 0):
        vector = vector.unsqueeze(-1)
    return vector


class Layers:
    """A graph whose layers are made to do something else, one call after another.

    Attributes:
        nodes: by name; by the name of a layer's output, what it gives now: a later layer may read it as its input.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.nodes = {node.name: node for node in rewriter.graph.nodes}

    def act(self, site: Site, call: Call, key: object, function: Callable[..., Tensor], *given: fx.Node) -> None:
        """Put a function of (x, weight, bias, *given), traced once for each key and signature, in a layer's place."""
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
        """Whether a site's values have the dtype of its weight. A layer that casts has several, and a slot has one."""
        if site.kind == "embedding":
            return True
        values = [self.nodes[name] for call in site.calls for name in (call.x, call.op, call.y)]
        values += [weight_and_bias(site, call, self.nodes)[0] for call in site.calls]
        return len({value.meta["val"].dtype for value in values}) == 1
