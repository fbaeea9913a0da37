"""Insert a weight method into a graph, at one call of its site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, fx

from peftfx.adapters.adapter import Adapter
from peftfx.contract.acting import Acting, adapted, overlap
from peftfx.contract.method import settings_of
from peftfx.contract.placement import WeightPlacement
from peftfx.graph.graph import ADAPTERS
from peftfx.passes.rewriting.site_op import bind, one_of_stack, read_beside, weight_and_bias
from peftfx.passes.rewriting.splice import Splicer
from peftfx.sites.site import Call, Site

Named = tuple[WeightPlacement, list[str]]
"""A placement at a site, and the names of its parameters."""
Read = tuple[WeightPlacement, dict[str, fx.Node]]
"""A placement at a site, and the nodes that read its parameters."""


def apply_at(splicer: Splicer, placement: WeightPlacement, call: Call, name: str, adapter: Adapter) -> None:
    """Splice a weight method's placement, of the adapter `name`, in at one call of its site."""
    op, x = splicer.nodes[call.op], splicer.latest.get(call.x, splicer.nodes[call.x])
    y = splicer.weighted.get(call.y, splicer.nodes[call.y])
    weight, bias = weight_and_bias(placement.site, call, splicer.nodes)
    params = splicer.parameters(placement, name, adapter, y)
    region = splicer.region(placement, name, splicer.nodes[call.y], params)
    params |= splicer.invocation(placement, region)
    under = [(p, read | splicer.invocation(p, region)) for p, read in _under(splicer, placement, y)]
    others = (n for _, read in under for n in read.values())
    arguments = [x, y, weight, bias, *read_beside(op, placement.site), *params.values(), *others]
    acting = [(placement, list(params)), *((p, list(read)) for p, read in under)]
    users = list(y.users)
    forward, key = _forward(acting, op, training=splicer.graph.training), _key(acting, op)
    named = type(placement.method).__name__
    result = splicer.at(y.next, y, region).trace(forward, *arguments, key=key, what=named, where=placement.site.path)
    splicer.weighted[call.y] = result
    splicer.replace(y, result, users)


def _under(splicer: Splicer, placement: WeightPlacement, y: fx.Node) -> list[Read]:
    """Return the earlier placements at the same rows, with their parameters, if the method runs them again."""
    if not placement.method.reruns:
        return []
    found = []
    for (name, _), other in splicer.placed.get(placement.site.path, {}).items():
        if overlap(other, placement):
            adapter = splicer.graph.module.get_submodule(f"{ADAPTERS}.{name}")
            assert isinstance(adapter, Adapter)
            found.append((other, splicer.parameters(other, name, adapter, y)))
    return found


def _key(acting: list[Named], op: fx.Node) -> object:
    """Return all that a trace depends on besides its operands."""
    fixed = [a for a in op.args if not isinstance(a, fx.Node)]
    number = one_of_stack(op, acting[0][0].site)
    return [(settings_of(p.method), _signature(p), p.block, names) for p, names in acting], op.target, number, fixed


def _signature(placement: WeightPlacement) -> Site:
    """Return what a trace depends on of a site. Similar sites share a trace."""
    return dataclasses.replace(placement.view, path="", layer=None, weight="", bias=None, calls=())


def _forward(acting: list[Named], op: fx.Node, *, training: bool) -> Callable[..., Tensor]:
    """Return a weight method's forward at one call as a function of (x, y, weight, bias, *held, *params).

    The method is the first in `acting`. The others are the placements that it runs again; their parameters come after
    its own.
    """
    site = acting[0][0].site
    places, count = [(Acting.of(placement), names) for placement, names in acting], len(read_beside(op, site))

    def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor) -> Tensor:
        values = iter(rest[count:])
        (first, p), *under = [(at, {name: next(values) for name in names}) for at, names in places]
        bound = bind(op, site, rest[:count])
        return adapted(first, p, bound, x, y, (weight, bias), under, training=training)

    return forward
