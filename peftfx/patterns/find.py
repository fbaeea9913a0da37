"""`with_patterns` adds the matches of users' patterns to the sites of a graph."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from peftfx.graph.graph import Graph
from peftfx.patterns.match import Match, weight_of
from peftfx.patterns.pattern import Pattern, known_patterns
from peftfx.sites.site import PATTERN, Call, Operand, PatternSite, layer_of
from peftfx.sites.sites import Sites


def with_patterns(graph: Graph, sites: Sites) -> Sites:
    """Return the sites of a base's graph with the matches of all known patterns. Each pattern is searched once.

    Without patterns, the sites are returned unchanged.
    """
    patterns = known_patterns()
    old = tuple(site for site in sites if site.kind != PATTERN)
    if not patterns:
        return dataclasses.replace(sites, items=old, misses={}) if len(old) < len(sites) else sites
    found: list[PatternSite] = []
    misses: dict[str, str] = {}
    for pattern in patterns:
        own = list(_sites(pattern, list(pattern.matches(graph))))
        found += own
        if not own and (near := pattern.explain(graph)):
            misses[pattern.name] = str(near[0])
    order = {node.name: i for i, node in enumerate(graph.nodes())}
    items = sorted((*old, *found), key=lambda site: order[site.calls[0].op])
    return dataclasses.replace(sites, items=tuple(items), misses=misses)


def _sites(pattern: Pattern, matches: Sequence[Match]) -> Iterator[PatternSite]:
    """Yield the matches as sites. Matches of one module on the same weights are one site with several calls."""
    groups: dict[object, list[Match]] = {}
    for number, match in enumerate(matches):
        weights = tuple(weight_of(node) for node in match.operands.values())
        alone = number if not any(weights) else -1
        groups.setdefault((match.module, weights, tuple(match.numbers.items()), alone), []).append(match)
    numbers: Counter[str] = Counter()
    for own in groups.values():
        module = own[0].module
        yield _site(pattern, own, f"{module}.{pattern.name}.{numbers[module]}".removeprefix("."))
        numbers[module] += 1


def _site(pattern: Pattern, matches: Sequence[Match], path: str) -> PatternSite:
    first = matches[0]
    inputs = [next(iter(match.operands.values())) for match in matches]
    calls = tuple(Call(x.name, match.y.name, match.y.name) for x, match in zip(inputs, matches, strict=True))
    return PatternSite(
        *(path, PATTERN, pattern.role, layer_of(first.module), "", None, (), False, (), calls),
        pattern=pattern.name,
        operands=tuple(_operand(name, node) for name, node in first.operands.items()),
        output=_operand("y", first.y),
        numbers=tuple(first.numbers.items()),
    )


def _operand(name: str, node: fx.Node) -> Operand:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    shape = tuple(_size(size) for size in value.shape)
    return Operand(name, shape, str(value.dtype).removeprefix("torch."), weight_of(node))


def _size(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else size.node.maybe_as_int()
