"""apply_at: a weight method put into a graph, at one call of its site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, fx

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import WeightMethod
from peftfx.contract.placement import Placement
from peftfx.passes.rewriting.site_op import bind, operands
from peftfx.passes.rewriting.splice import Splicer
from peftfx.sites.site import Call, Site


def apply_at(splicer: Splicer, placement: Placement, call: Call, name: str, adapter: Adapter) -> None:
    """Splice a weight method's placement, of the adapter of this name, in at one call of its site."""
    op, x = splicer.nodes[call.op], splicer.latest.get(call.x, splicer.nodes[call.x])
    y = splicer.weighted.get(call.y, splicer.nodes[call.y])
    weight, bias = operands(placement.site, call, splicer.nodes)
    params = splicer.parameters(placement, name, adapter, y)
    arguments = [x, y, weight, bias, *params.values()]
    values = [None if n is None else n.meta["val"] for n in arguments]
    traced = _trace(splicer, placement, op, list(params), values)
    region = splicer.region(placement, name, splicer.nodes[call.y], params)
    users = list(y.users)
    result = splicer.splice(traced, arguments, before=y.next, like=y, region=region)
    splicer.weighted[call.y] = result
    splicer.replace(y, result, users)


def _trace(
    splicer: Splicer, placement: Placement, op: fx.Node, names: list[str], values: list[object]
) -> fx.GraphModule:
    site = dataclasses.replace(placement.view, path="", layer=None, weight="", bias=None, calls=())
    fixed = [a for a in op.args if not isinstance(a, fx.Node)]
    forward = _forward(placement, op, names, training=splicer.graph.training)
    key = (placement.method, site, placement.block, op.target, fixed, names)
    return splicer.traced(key, forward, values, placement.method, placement.site.path)


def _forward(placement: Placement, op: fx.Node, names: list[str], *, training: bool) -> Callable[..., Tensor]:
    """A weight method's forward at one call as a function of (x, y, weight, bias, *params)."""
    bound, block, method = bind(op, placement.site), placement.block, placement.method
    assert isinstance(method, WeightMethod)
    site = dataclasses.replace(placement.view, path="")  # one trace serves every site of this signature

    def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        base, p = placement.base(weight, bias), dict(zip(names, params, strict=True))
        if block is None:
            return method.forward(site, bound, x, y, base, p, training)
        rows = method.forward(site, bound, x, block.take(y, _row_dim(site)), base, p, training)
        return block.put(y, rows, _row_dim(site))

    return forward


def _row_dim(site: Site) -> int:
    """Which dimension of a site's output its weight's rows are."""
    return -1 if site.kind != "conv" else 1 - len(site.shape)
