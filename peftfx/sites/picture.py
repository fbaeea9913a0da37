"""`picture` draws the sites of a model as a page. Equal layers are drawn once, unless adapters make them differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import networkx as nx

from peftfx.errors import how_many
from peftfx.pages.drawing import Adapted, Box, Card, Column, draw
from peftfx.pages.page import Page
from peftfx.sites.dataflow import keys_of
from peftfx.sites.network import cut_layers, equal_layers, inner_layer, layer_path
from peftfx.sites.site import PATTERN, Site

Marks = Mapping[str, Sequence[Adapted]]
"""The adapters that act at sites, by the sites' paths."""


def picture(sites: Sequence[Site], network: nx.DiGraph, title: str, marks: Marks | None = None, lead: str = "") -> Page:
    """Return the page of a model's sites.

    Args:
        sites: all sites of a base.
        network: the network of the sites, from `Sites.network`.
        title: the page's title.
        marks: the adapters that act at each site.
        lead: a line below the title.
    """
    drawn = _Picture(sites, network, marks or {})
    count = how_many(len(sites), "site")
    return draw(title, f"{count}; {lead}" if lead else count, drawn.columns())


class _Picture:
    """The state of one drawing of a page."""

    def __init__(self, sites: Sequence[Site], network: nx.DiGraph, marks: Marks) -> None:
        self.network, self.marks = network, marks
        plain = [site for site in sites if site.kind != PATTERN]
        self.names = {id(site): name for site, name in zip(plain, keys_of(plain), strict=True)}
        self.names |= {id(site): site.path for site in sites if site.kind == PATTERN}
        self.sites = list(sites)
        self.cut = cut_layers(network)
        groups = equal_layers(network, self.cut)
        self.alike = {layer: number for number, layers in enumerate(groups) for layer in layers}

    def columns(self) -> list[Column]:
        """Return the parts of the model, each with its layers in the order in which they run."""
        places = self._places()
        by_column: dict[str, list[Site]] = {}
        for site in self.sites:
            by_column.setdefault(places[id(site)], []).append(site)
        return [Column(title or "model", tuple(self._cards(own))) for title, own in by_column.items()]

    def _places(self) -> dict[int, str]:
        """Return the column of each site: where layers' paths differ. Other sites go where the site before went."""
        ways = [stack.split(".") for stack in dict.fromkeys(_stack(site.path) for site in self.sites) if stack]
        shared = 0
        while ways and all(len(way) > shared for way in ways) and len({way[shared] for way in ways}) == 1:
            shared += 1
        known = {".".join(way[: shared + 1]) for way in ways if len(way) > shared} or {""}
        found, last = dict[int, str](), next(iter(sorted(known)))
        first = next((s for s in self.sites if _stack(s.path)), None)
        if first is not None:
            last = ".".join(_stack(first.path).split(".")[: shared + 1]) if len(known) > 1 else last
        for site in self.sites:
            own = ".".join(site.path.split(".")[: shared + 1])
            last = found[id(site)] = own if own in known else last
        return found if len(known) > 1 else dict.fromkeys(found, "")

    def _cards(self, sites: Sequence[Site]) -> list[Card]:
        layers: dict[str, list[Site]] = {}
        numbers = itertools.count()
        for layer, run in itertools.groupby(sites, lambda site: inner_layer(site.path, self.cut)):
            layers.setdefault(layer or f"#{next(numbers)}", []).extend(run)
        groups: dict[object, list[str]] = {}
        for layer, own in layers.items():
            acting = tuple((self._inside(site, layer), self._acting(site)) for site in own)
            key = layer if layer.startswith("#") else (_stack_of(layer), self.alike.get(layer, layer), acting)
            groups.setdefault(key, []).append(layer)
        return [self._card(group, layers) for group in groups.values()]

    def _acting(self, site: Site) -> tuple[str, ...]:
        return tuple(adapted.short for adapted in self.marks.get(site.path, ()))

    def _inside(self, site: Site, layer: str) -> str:
        return site.path.removeprefix(layer)

    def _card(self, group: Sequence[str], layers: Mapping[str, Sequence[Site]]) -> Card:
        first, sites = group[0], layers[group[0]]
        own = {self.names[id(site)]: site for site in sites}
        pred, succ = self.network.pred, self.network.succ
        near = {other for name in own if name in self.network for other in (*pred[name], *succ[name])}
        joins = {n for n in near if n.startswith("join:") and self._is_inside(n, first, own)}
        inside = own.keys() | joins
        edges = tuple((a, b) for a, b in self.network.subgraph(inside).edges)
        numbers = tuple(int(layer.rpartition(".")[2]) for layer in group) if not first.startswith("#") else ()
        title = f"{_stack_of(first)} {_ranges(numbers)}" if numbers else _common(sites)
        times = {layer: {self._inside(site, layer): site for site in layers[layer]} for layer in group}
        boxes = tuple(self._box(site, first, numbers, times) for site in sites)
        return Card(title, len(group), boxes, tuple(sorted(joins)), edges)

    def _is_inside(self, join: str, layer: str, own: Mapping[str, Site]) -> bool:
        path = inner_layer(self.network.nodes[join]["path"], self.cut)
        return path == layer if path else layer.startswith("#") and any(p in own for p in self.network.pred[join])

    def _box(self, site: Site, layer: str, numbers: tuple[int, ...], times: Mapping[str, Mapping[str, Site]]) -> Box:
        inner, several = self._inside(site, layer), len(numbers) > 1
        alike = [by[inner] for by in times.values() if inner in by] if several else [site]
        calls = f"{len(site.calls)} in a run" if len(site.calls) > 1 else ""
        transposed = ", stored [in, out]" if site.transposed and site.shape else ""
        rows = "\n".join(f"{part.role}: {_rows(part.rows)}" for part in site.parts)
        return Box(
            name=self.names[id(site)],
            label=_label(site),
            path=f"{_stack_of(layer)}.*{inner}" if several else site.path or "the model",
            numbers=numbers if several else (),
            role=site.role,
            kind=site.kind,
            shape="x".join(map(str, site.shape)) + transposed,
            calls=calls,
            rows=rows,
            reads=_reads(site),
            parts=tuple(part.role for part in site.parts),
            adapters=_gathered([self.marks.get(own.path, ()) for own in alike]),
        )


def _gathered(acting: Sequence[Sequence[Adapted]]) -> tuple[Adapted, ...]:
    """Return what acts at equal places, listed once. Differences between the places are shown in the lines."""
    found = []
    for same in zip(*acting, strict=False):
        lines = [one.said.split("\n") for one in same]
        told = [_span([line[i] for line in lines if i < len(line)]) for i in range(len(lines[0]))]
        found.append(Adapted(same[0].what, "\n".join(told), same[0].short))
    return tuple(found)


def _span(said: Sequence[str]) -> str:
    """Return one line for equal places: the common line, or else the first and the last."""
    return said[0] if len(set(said)) == 1 else f"{said[0]} … {said[-1].partition(': ')[2] or said[-1]}"


def _stack(path: str) -> str:
    return _stack_of(layer_path(path))


def _stack_of(layer: str) -> str:
    return layer.rpartition(".")[0]


def _common(sites: Sequence[Site]) -> str:
    """Return a common title for sites that are in no layer."""
    words = [site.path.split(".") for site in sites]
    shared = [a for a, *rest in zip(*words, strict=False) if all(a == b for b in rest)]
    return ".".join(shared) or ", ".join(dict.fromkeys(site.path.partition(".")[0] or "the model" for site in sites))


def _label(site: Site) -> str:
    """Return the end of a path as a short label. A number gets the word before it."""
    words = site.path.split(".") if site.path else ["the model"]
    last = [word for word in words[-2:] if word] if words[-1].isdigit() else words[-1:]
    if site.kind == "attention":
        return f"{last[-1]} (attention)" if len(last[-1]) < 9 else "attention"
    return ".".join(last)


def _reads(site: Site) -> str:
    return _operands(site) if site.kind == PATTERN else ""


def _operands(site: object) -> str:
    operands = getattr(site, "operands", ())
    return "\n".join(f"{o.name}: {o.weight.partition('.')[2] or 'a value'}" for o in operands)


def _rows(rows: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start} to {stop - 1}" for start, stop in rows[:2])
    return f"rows {shown}" + (f" and {len(rows) - 2} more runs" if len(rows) > 2 else "")


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text with ranges, such as `0–3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
