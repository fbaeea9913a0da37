"""Insert a pattern method into a graph, at each call of its site."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from peftfx.contract.completeness import asking, refuse_forward_output
from peftfx.contract.method import settings_of
from peftfx.contract.placed import Placements
from peftfx.contract.placement import PatternPlacement
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import REGION
from peftfx.passes.base import results
from peftfx.passes.rewriting.splice import Splicer
from peftfx.sites.site import Operand, PatternSite


def apply_at_match(splicer: Splicer, placement: PatternPlacement) -> int:
    """Splice a pattern method in where its pattern matched. Return the number of calls."""
    method, path = placement.method, placement.site.path
    site = next((s for s in splicer.graph.sites.patterns if s.path == path), None)
    if site is None:  # this view does not run the match
        return 0
    own, named = unnamed(site), type(method).__name__
    for call in splicer.called(site).calls:
        x, y = (splicer.latest.get(name, splicer.nodes[name]) for name in (call.x, call.y))
        params = splicer.parameters(placement, splicer.name, splicer.adapter, y)
        names = list(params)

        def forward(x: Tensor, y: Tensor, *given: Tensor, names: list[str] = names) -> Tensor:
            with asking(method, "forward", path):
                made = method.forward(own, x, y, dict(zip(names, given, strict=True)), splicer.graph.training)
            refuse_forward_output(method, path, made, y)
            return made

        region = splicer.region(placement, splicer.name, splicer.nodes[call.y], params)
        users = list(y.users)
        at = splicer.at(y.next, y, region)
        result = at.trace(
            forward, x, y, *params.values(), key=("match", settings_of(method), own, names), what=named, where=path
        )
        splicer.replace(y, result, users)
    return len(site.calls)


def refuse_within_layers(graph: Graph) -> None:
    """Refuse a pattern method inside a layer that a weight method adapts: a merge would mix the two.

    Such a layer flattens its input, computes a product, and restores the shape. A merged pattern method would act on
    the weight method's output, too.
    """
    regions = [result.meta[REGION] for result in results(graph)]
    inner = {r.y: p.method for r in regions for p in Placements([r.placement]).patterns}
    for placement in Placements(r.placement for r in regions if inner).weights:
        call = next((call for call in placement.site.calls if call.y != call.op and call.op in inner), None)
        if call is not None:
            kind = type(inner[call.op]).__name__
            what = f"{kind} acts within this layer, whose whole output {type(placement.method).__name__} adapts"
            raise PeftfxError(what, placement.site.path, "write the pattern around the whole layer, or leave it out")


def unnamed(site: PatternSite) -> PatternSite:
    """Return a match as its method sees it, without what distinguishes it from similar matches."""
    operands = tuple(_unnamed(operand) for operand in site.operands)
    return dataclasses.replace(site, path="", layer=None, calls=(), operands=operands)


def _unnamed(operand: Operand) -> Operand:
    return dataclasses.replace(operand, weight="")
