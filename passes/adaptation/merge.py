"""Rewrite adapted sites to plain operations on derived weights. The weights are recipes; nothing is computed yet.

Other parts of adapters that depend on no input, such as soft prompts, become recipes, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from peftfx.adapters.recipes import Derived, Folding, Own, RecipeStep
from peftfx.graph.graph import ADAPTERS, DERIVED, Graph
from peftfx.graph.rewriter import OVERRIDES, REGION, Rewriter
from peftfx.passes.adaptation.constants import freeze
from peftfx.passes.adaptation.pattern_weights import Folds, MatchStep, foldable
from peftfx.passes.base import Pass, PassResult, Region, attributes_of, fake_like, results
from peftfx.passes.rewriting.site_op import rewire, weight_and_bias
from peftfx.sites.site import Site


@dataclass(frozen=True)
class Merge(Pass):
    """Fold every insertion into the weights that it acts on. Insertions that act on no weight become constants.

    A pattern method is folded if its whole effect is in the weights of layers (`PatternMethod.folds`).

    Sites that share a tensor each get a weight of their own.
    """

    preserves = True
    requires = ("intact",)
    ensures = ("merged",)

    def __call__(self, graph: Graph) -> PassResult:
        matches, _ = foldable(graph)
        steps = _steps(graph, matches)
        if not results(graph) and not any(OVERRIDES in n.meta for n in graph.nodes()):
            return PassResult(graph, 0)
        merged = _without_regions(graph, matches)
        nodes, rewriter = {n.name: n for n in merged.nodes()}, Rewriter(merged.module.graph)
        sites = merged.sites.weights_by_path
        for path, own in steps.items():
            _fold_site(rewriter, merged, sites[path], tuple(own), nodes)
        rewriter.close(merged)
        frozen = freeze(merged)
        for node in attributes_of(merged).values():
            if not node.users:
                merged.module.graph.erase_node(node)
            elif OVERRIDES in node.meta and str(node.target).startswith(f"{ADAPTERS}."):
                _rename_override(merged, node)
        merged.module.recompile()
        return PassResult(merged, len(steps) + frozen)


def _rename_override(graph: Graph, node: fx.Node) -> None:
    """Give a trained copy the name of the base's tensor that it replaces."""
    target = str(node.target)
    name = target.split(".", 3)[3]  # adapters.<adapter>.saved.<name>
    if name in graph.derived:  # a tied module reads the copy, and another module has a merged weight of that name
        name = f"{name}.tied"
    graph.derived[name] = Own(target)
    node.target = f"{DERIVED}.{name}"


def _steps(graph: Graph, matches: Sequence[Folds]) -> dict[str, list[RecipeStep | MatchStep]]:
    """Return the steps at each site's weight, in order, each step once even if the site is called several times.

    Methods at a pattern's match come last: they act on the outputs of the adapted layers in the match.
    """
    regions: dict[str, list[Region]] = {}
    for region in (result.meta[REGION] for result in results(graph)):
        if region.placement.on_weight is None:
            continue
        own = regions.setdefault(region.placement.site.path, [])
        if all((r.adapter, r.placement) != (region.adapter, region.placement) for r in own):
            own.append(region)
    steps: dict[str, list[RecipeStep | MatchStep]] = {path: _at_weight(own) for path, own in regions.items()}
    for site, step in (pair for match in matches for pair in match.steps()):
        steps.setdefault(site.path, []).append(step)
    return steps


def _at_weight(regions: Sequence[Region]) -> list[RecipeStep | MatchStep]:
    acting = ((r.placement.on_weight, r.params) for r in regions)
    return [RecipeStep(p.method, p.view, p.block, dict(params)) for p, params in acting if p is not None]


def _without_regions(graph: Graph, matches: Sequence[Folds]) -> Graph:
    """Return the graph without insertions at weights, and without matches that fold into weights. Overrides stay."""

    def goes(node: fx.Node) -> bool:
        region = node.meta.get(REGION)
        folds = region is not None and any(match.covers(region) for match in matches)
        return folds or (region is not None and region.placement.on_weight is not None)

    merged = graph.clone()
    nodes = {n.name: n for n in merged.nodes()}
    for result in results(merged):
        if goes(result):
            result.replace_all_uses_with(nodes[result.meta[REGION].y])
    for node in reversed(list(merged.nodes())):
        if goes(node):
            merged.module.graph.erase_node(node)
    return merged


def _fold_site(
    rewriter: Rewriter, graph: Graph, site: Site, steps: tuple[RecipeStep | MatchStep, ...], nodes: dict[str, fx.Node]
) -> None:
    weight, bias = weight_and_bias(site, site.calls[0], nodes)
    folding = Folding(site, str(weight.target), None if bias is None else str(bias.target), steps)
    new_weight, new_bias = _meta(folding, graph, weight, bias)
    graph.derived[f"{site.path}.weight"] = Derived(folding, "weight")
    derived = rewriter.attribute(f"{DERIVED}.{site.path}.weight", new_weight)
    if new_bias is not None:
        graph.derived[f"{site.path}.bias"] = Derived(folding, "bias")
        bias = rewriter.attribute(f"{DERIVED}.{site.path}.bias", new_bias)
    for call in site.calls:
        rewire(rewriter, site, call, nodes, derived, bias, dense=new_weight.shape != weight.meta["val"].shape)


def _meta(folding: Folding, graph: Graph, weight: fx.Node, bias: fx.Node | None) -> tuple[Tensor, Tensor | None]:
    """Return fake tensors like the derived weight, and like the bias if it changes, folded on the meta device."""
    own = {folding.weight: weight.meta["val"]}
    if bias is not None:
        own[str(bias.target)] = bias.meta["val"]
    memo: dict[str, Tensor] = {}

    def get(target: str) -> Tensor:
        if target not in memo:
            like = own[target] if target in own else graph.get(target)
            memo[target] = torch.empty(tuple(like.shape), dtype=like.dtype, device="meta")
        return memo[target]

    new = folding.evaluate(get)
    unchanged = folding.bias is not None and new.bias is get(folding.bias)
    anchor = weight.meta["val"]
    return fake_like(anchor, new.weight), None if unchanged or new.bias is None else fake_like(anchor, new.bias)
