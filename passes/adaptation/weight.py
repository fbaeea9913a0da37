"""apply_at: a weight method put into a graph, at one call of its site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, fx

from peftfx.adapters.adapter import Adapter
from peftfx.contract.completeness import asking, refuse_output
from peftfx.contract.method import Op, WeightMethod
from peftfx.contract.placement import Placement
from peftfx.graph.graph import ADAPTERS
from peftfx.passes.rewriting.site_op import bind, operands
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
    arguments = [x, y, weight, bias, *params.values(), *(n for _, read in under for n in read.values())]
    values = [None if n is None else n.meta["val"] for n in arguments]
    acting = [(placement, list(params)), *((p, list(read)) for p, read in under)]
    traced = _trace(splicer, acting, op, values)
    region = splicer.region(placement, name, splicer.nodes[call.y], params)
    users = list(y.users)
    result = splicer.splice(traced, arguments, before=y.next, like=y, region=region)
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


def _trace(splicer: Splicer, acting: list[Acting], op: fx.Node, values: list[object]) -> fx.GraphModule:
    placement, _ = acting[0]
    fixed = [a for a in op.args if not isinstance(a, fx.Node)]
    forward = _forward(acting, op, training=splicer.graph.training)
    methods = [(p.method, _signature(p), p.block, names) for p, names in acting]
    return splicer.traced((methods, op.target, fixed), forward, values, placement.method, placement.site.path)


def _signature(placement: Placement) -> Site:
    """What a trace depends on of a site: one serves all that are alike."""
    return dataclasses.replace(placement.view, path="", layer=None, weight="", bias=None, calls=())


def _forward(acting: list[Acting], op: fx.Node, *, training: bool) -> Callable[..., Tensor]:
    """A weight method's forward at one call as a function of (x, y, weight, bias, *params).

    It is the first of those acting; the others are what it runs again, with their parameters behind its own.
    """
    (placement, names), *under = acting
    bound, block, method = bind(op, placement.site), placement.block, placement.method
    assert isinstance(method, WeightMethod)
    where, site = (
        placement.site.path,
        dataclasses.replace(placement.view, path=""),
    )  # one trace serves every site of this signature
    steps = [(_forward([step], op, training=training), len(step[1])) for step in under]

    def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        base, p = placement.base(weight, bias), dict(zip(names, params, strict=False))

        def again(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y, at = bound(x, whole.weight, whole.bias), len(names)
            for step, count in steps:
                y, at = step(x, y, *stored, *params[at : at + count]), at + count
            return y if block is None else block.take(y, _row_dim(site))

        stored, whole = (weight, bias), dataclasses.replace(placement, part=None).base(weight, bias)
        run: Op = again if steps else bound
        own = y if block is None else block.take(y, _row_dim(site))
        with asking(method, "forward", where):
            rows = method.forward(site, run, x, own, base, p, training)
        refuse_output(method, where, rows, own)
        return rows if block is None else block.put(y, rows, _row_dim(site))

    return forward


def _row_dim(site: Site) -> int:
    """Which dimension of a site's output its weight's rows are."""
    return -1 if site.kind != "conv" else 1 - len(site.shape)
