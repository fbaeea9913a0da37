"""Draw a model as SVG: boxes in cards in columns, laid out by which box reads which; and make the page around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftfx.pages.page import Page, make_page, table, text

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _EDGE = 136, 32, 12, 20, 14
COLOURS = ("embedding", "attention", "mlp", "experts", "norm", "conv", "linear", "head", "pattern")
MOST_ACROSS = 5  #: the most boxes in a row; a longer row continues below


@dataclass(frozen=True)
class Adapted:
    """The texts about an adapter at the places of a box.

    Attributes:
        what: the method, and the adapter's name if there are several adapters.
        said: further lines about the adapter.
        short: the text on the box.
    """

    what: str
    said: str
    short: str


@dataclass(frozen=True)
class Box:
    """A site, or equal sites of several layers.

    Attributes:
        name: the name used in the card's edges.
        label: the text on the box.
        path: the module path, with `*` in place of the layers' numbers.
        numbers: the layers' numbers.
        role, kind, shape, calls, rows, reads: facts about the site, as texts.
        parts: the roles of its parts.
        adapters: the adapters that act there.
    """

    name: str
    label: str
    path: str
    numbers: tuple[int, ...]
    role: str
    kind: str
    shape: str = ""
    calls: str = ""
    rows: str = ""
    reads: str = ""
    parts: tuple[str, ...] = ()
    adapters: tuple[Adapted, ...] = ()

    def data(self) -> dict[str, object]:
        """Return the data about the box for the page's script."""
        told = {"shape": self.shape, "calls": self.calls, "rows": self.rows, "reads": self.reads}
        return {
            "path": self.path,
            "n": self.numbers,
            "role": self.role,
            "kind": self.kind,
            "parts": self.parts,
            **{name: value for name, value in told.items() if value},
            "adapters": [{"what": a.what, "said": a.said} for a in self.adapters],
        }

    @property
    def colour(self) -> str:
        """The group of roles that gives the box its colour."""
        group = self.role.partition(".")[0]
        if self.kind == "pattern":
            return "pattern"
        return "experts" if group == "router" else group if group in COLOURS else "linear"


@dataclass(frozen=True)
class Card:
    """A layer, or several equal layers.

    Attributes:
        title: the name of the layers.
        count: the number of layers.
        boxes: the boxes, in the order in which their sites run.
        joins: the names of sums through which edges go.
        edges: pairs of the giving and the reading box or join, by name.
    """

    title: str
    count: int
    boxes: tuple[Box, ...]
    joins: tuple[str, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Column:
    """A part of the model, such as an encoder or a decoder."""

    title: str
    cards: tuple[Card, ...] = field(repr=False)


def draw(title: str, lead: str, columns: Sequence[Column], more: str = "") -> Page:
    """Make the page of a model.

    Args:
        title, lead: the heading, and the line below it.
        columns: the columns, side by side.
        more: HTML to put below the columns.
    """
    data: list[dict[str, object]] = []
    drawn = "".join(_column(column, data, alone=len(columns) == 1) for column in columns)
    boxes = [box for column in columns for card in column.cards for box in card.boxes]
    used = [colour for colour in COLOURS if any(box.colour == colour for box in boxes)]
    key = "".join(f'<li><i style="background:var(--{c})"></i>{c}</li>' for c in used)
    rows = [(b.path, len(b.numbers) or 1, b.kind, b.role, b.shape) for b in boxes]
    listed = table(("path", "places", "kind", "role", "shape"), rows)
    body = (
        '<div class="bar-top"><label>Search <input type="search" placeholder="a path, a role or a target: '
        'attention.query | mlp" aria-label="Search by path, role or target"></label><output aria-live="polite">'
        f'</output><ul class="key" aria-label="colours">{key}</ul></div><main><div class="drawn">'
        f'<div class="columns">{drawn}</div><aside aria-live="polite" aria-label="the chosen site"><p>Click a site, or '
        "go to one with Tab and the arrow keys. / searches.</p></aside></div>"
        f"{more}<details><summary>All sites as a table</summary>{listed}</details></main>"
    )
    return make_page(title, lead, body, data)


def _column(column: Column, data: list[dict[str, object]], *, alone: bool) -> str:
    head = "" if alone else f"<h2>{text(column.title)}</h2>"
    return f'<section class="column">{head}{"".join(_card(card, data) for card in column.cards)}</section>'


def _card(card: Card, data: list[dict[str, object]]) -> str:
    times = f"<b>× {card.count}</b>" if card.count > 1 else ""
    return f'<div class="card"><h3>{times}{text(card.title)}</h3>{_svg(card, data)}</div>'


def _svg(card: Card, data: list[dict[str, object]]) -> str:
    places, (width, height) = _laid(card)
    lines = [_edge(places[a], places[b], width) for a, b in card.edges]
    dots = [f'<circle cx="{x}" cy="{y}" r="4"/>' for x, y in (places[name] for name in card.joins)]
    boxes = []
    for box in card.boxes:
        boxes.append(_box(box, places[box.name], len(data)))
        data.append(box.data())
    label = text(f"sites of {card.title}")
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="group" aria-label="{label}">'
        f"{''.join(lines)}{''.join(dots)}{''.join(boxes)}</svg>"
    )


def _box(box: Box, place: tuple[int, int], number: int) -> str:
    x, y = place[0] - _WIDTH // 2, place[1] - _HEIGHT // 2
    adapted = "; ".join(a.short for a in box.adapters)
    said = text(", ".join(filter(None, (box.role, box.path, box.shape, adapted))))
    mark = f'<text class="m" x="{x + 7}" y="{y + 26}">{text(_short(adapted, 21))}</text>' if adapted else ""
    line = y + (14 if adapted else 20)
    return (
        f'<g class="s{" a" if adapted else ""}" tabindex="0" role="button" aria-pressed="false" data-i="{number}" '
        f'aria-label="{said}"><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" '
        f'style="fill:var(--{box.colour})"/><text x="{x + 7}" y="{line}">{text(_short(box.label, 19))}</text>{mark}</g>'
    )


def _edge(start: tuple[int, int], end: tuple[int, int], width: int) -> str:
    """Draw a line from below one box to above another. A line that passes a row goes around on the right."""
    (ax, ay), (bx, by) = start, end
    if by - ay <= _HEIGHT + _DOWN:
        return f'<path d="M{ax} {ay}C{ax} {(ay + by) // 2} {bx} {(ay + by) // 2} {bx} {by}"/>'
    side = width - 3
    return (
        f'<path d="M{ax} {ay}C{side} {ay + 14} {side} {ay + 14} {side} {ay + 34}V{by - 34}'
        f'C{side} {by - 14} {side} {by - 14} {bx} {by}"/>'
    )


def _laid(card: Card) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
    """Return the middle of each box and join, and the size of the drawing."""
    rows = _rows(card)
    widest = max(len(row) for row in rows)
    width = widest * (_WIDTH + _ACROSS) + 2 * _EDGE
    joins, places, y = set(card.joins), dict[str, tuple[int, int]](), 8
    for row in rows:
        tall = 10 if all(name in joins for name in row) else _HEIGHT
        left = (width - len(row) * (_WIDTH + _ACROSS) + _ACROSS) // 2 + _WIDTH // 2
        for i, name in enumerate(row):
            places[name] = (left + i * (_WIDTH + _ACROSS), y + tall // 2)
        y += tall + _DOWN
    return places, (width, y - _DOWN + 8)


def _rows(card: Card) -> list[list[str]]:
    """Arrange the names in rows, each below all that it reads. A row that is too long continues in the next."""
    order = [box.name for box in card.boxes]
    names = [*order, *card.joins]
    above: dict[str, list[str]] = {name: [] for name in names}
    for start, end in card.edges:
        above[end].append(start)
    depth = _depths(names, above)
    below: dict[str, list[str]] = {name: [end for start, end in card.edges if start == name] for name in names}
    for name in names:  # a box that reads nothing here is put just above its reader, such as keys of a cross-attention
        if not above[name] and below[name]:
            depth[name] = max(depth[name], min(depth[end] for end in below[name]) - 1)
    loose = [box.name for box in card.boxes if box.kind == "pattern"]
    for name in loose:  # beside the box that the pattern ends in
        before = order[: order.index(name)]
        depth[name] = depth[before[-1]] if before else 0
    rows: list[list[str]] = []
    for level in sorted(set(depth.values())):
        row = [name for name in names if depth[name] == level]
        rows += [row[i : i + MOST_ACROSS] for i in range(0, len(row), MOST_ACROSS)]
    return rows


def _depths(names: Sequence[str], above: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return for each name the longest path from a name that reads nothing. Cycles are ignored."""
    depth: dict[str, int] = {}
    for root in names:
        stack, open_ = [root], set[str]()
        while stack:
            name = stack[-1]
            waiting = [a for a in above[name] if a not in depth and a not in open_]
            if name in depth or not waiting:
                stack.pop()
                open_.discard(name)
                depth.setdefault(name, 1 + max((depth[a] for a in above[name] if a in depth), default=-1))
            else:
                open_.add(name)
                stack.append(waiting[0])
    return depth


def _short(value: str, most: int) -> str:
    return value if len(value) <= most else f"{value[: most - 1]}…"
