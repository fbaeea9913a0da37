"""apply_at: a weight method put into a graph, at one call of its site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, fx

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import Op, WeightMethod
from peftfx.contract.placement import Placement
from peftfx.graph.graph import ADAPTERS
from peftfx.passes.rewriting.site_op import bind, held, operands
from peftfx.passes.rewriting.splice import Splicer
from peftfx.sites.site import Call, Site

Acting = tuple[Placement, list[str]]
"""What acts at a site, and the names of its parameters."""


def apply_at(splicer: Splicer, placement: Placement, call: Call, name: str, adapter: Adapter) -> None:
    """Splice a weight method's placement, of the adapter of this name, in at one call of its site."""
    op, x = splicer.nodes[call.op], splicer.latest.get(call.x, splicer.nodes[call.x])
    y = splicer.weighted.get(call.y, splicer.nodes[call.y])
    weight, bias = operands(placement.site, call, splicer.nodes)
    params = splicer.parameters(placement, name, adapter, y)
    under = _under(splicer, placement, y)
    others = (n for _, read in under for n in read.values())
    arguments = [x, y, weight, bias, *held(op, placement.site), *params.values(), *others]
    acting = [(placement, list(params)), *((p, list(read)) for p, read in under)]
    region = splicer.region(placement, name, splicer.nodes[call.y], params)
    users = list(y.users)
    forward, key = _forward(acting, op, training=splicer.graph.training), _key(acting, op)
    named = type(placement.method).__name__
    result = splicer.at(y.next, y, region).trace(forward, *arguments, key=key, what=named, where=placement.site.path)
    splicer.weighted[call.y] = result
    splicer.replace(y, result, users)


def _under(splicer: Splicer, placement: Placement, y: fx.Node) -> list[tuple[Placement, dict[str, fx.Node]]]:
    """What acts at a placement's rows already, with its parameters, where the method runs that again."""
    assert isinstance(placement.method, WeightMethod)
    if not placement.method.reruns:
        return []
    found = []
    for (name, _), other in splicer.placed.get(placement.site.path, {}).items():
        if None in (other.part, placement.part) or other.part == placement.part:
            adapter = splicer.graph.module.get_submodule(f"{ADAPTERS}.{name}")
            assert isinstance(adapter, Adapter)
            found.append((other, splicer.parameters(other, name, adapter, y)))
    return found


def _key(acting: list[Acting], op: fx.Node) -> object:
    """What a trace depends on, beside its operands."""
    fixed = [a for a in op.args if not isinstance(a, fx.Node)]
    return [(p.method, _signature(p), p.block, names) for p, names in acting], op.target, fixed


def _signature(placement: Placement) -> Site:
    """What a trace depends on of a site: one serves all that are alike."""
    return dataclasses.replace(placement.view, path="", layer=None, weight="", bias=None, calls=())


def _forward(acting: list[Acting], op: fx.Node, *, training: bool) -> Callable[..., Tensor]:
    """A weight method's forward at one call as a function of (x, y, weight, bias, *held, *params).

    It is the first of those acting; the others are what it runs again, with their parameters behind its own.
    """
    (placement, names), *under = acting
    block, method, count = placement.block, placement.method, len(held(op, placement.site))
    assert isinstance(method, WeightMethod)
    site = dataclasses.replace(placement.view, path="")  # one trace serves every site of this signature
    steps = [(_forward([step], op, training=training), len(step[1])) for step in under]

    def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor) -> Tensor:
        own, params = rest[:count], rest[count:]
        bound = bind(op, placement.site, own)
        base, p = placement.base(weight, bias), dict(zip(names, params, strict=False))

        def again(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y, at = bound(x, whole.weight, whole.bias), len(names)
            for step, size in steps:
                y, at = step(x, y, *stored, *own, *params[at : at + size]), at + size
            return y if block is None else block.take(y, _row_dim(site))

        stored, whole = (weight, bias), dataclasses.replace(placement, part=None).base(weight, bias)
        run: Op = again if steps else bound
        if block is None:
            return method.forward(site, run, x, y, base, p, training)
        rows = method.forward(site, run, x, block.take(y, _row_dim(site)), base, p, training)
        return block.put(y, rows, _row_dim(site))

    return forward


def _row_dim(site: Site) -> int:
    """Which dimension of a site's output its weight's rows are."""
    return -1 if site.kind != "conv" else 1 - len(site.shape)
