"""Draw a model as SVG: boxes in cards in columns, laid out by which box reads which; and make the page around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peftfx.pages.layout import BOX_HEIGHT, BOX_WIDTH, Arranged, Centre, lay_out
from peftfx.pages.page import Page, make_page, table, text

COLOURS = ("embedding", "attention", "mlp", "experts", "norm", "conv", "linear", "head", "pattern")
_LEAST = 0.75  #: the share of its size that a card shrinks to where columns need room
_FITS, _SQUEEZED = 19, 25  #: letters that fit on a box; letters that are squeezed onto it. The rest is cut off


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
    laid = [_laid(card) for card in column.cards]
    widest = max(own.width for own in laid)
    cards = (_card(card, own, widest, data) for card, own in zip(column.cards, laid, strict=True))
    return f'<section class="column">{head}{"".join(cards)}</section>'


def _laid(card: Card) -> Arranged:
    beside = [box.name for box in card.boxes if box.kind == "pattern"]
    return lay_out([box.name for box in card.boxes], card.joins, beside, card.edges)


def _card(card: Card, laid: Arranged, widest: int, data: list[dict[str, object]]) -> str:
    times = f"<b>× {card.count}</b>" if card.count > 1 else ""
    return f'<div class="card"><h3>{times}{text(card.title)}</h3>{_svg(card, laid, widest, data)}</div>'


def _svg(card: Card, laid: Arranged, widest: int, data: list[dict[str, object]]) -> str:
    """A card's drawing; those of one column, of which the widest is told, shrink alike."""
    lines = [f'<path d="{line}"/>' for line in laid.lines]
    dots = [f'<circle cx="{x}" cy="{y}" r="4"/>' for x, y in (laid.places[name] for name in card.joins)]
    boxes = []
    for box in card.boxes:
        boxes.append(_box(box, laid.places[box.name], len(data)))
        data.append(box.data())
    label = text(f"sites of {card.title}")
    size = f'width="{laid.width}" height="{laid.height}" viewBox="0 0 {laid.width} {laid.height}"'
    shrinks = f"width:{100 * laid.width / widest:.4g}%;max-width:{laid.width}px;--least:{int(_LEAST * laid.width)}px"
    return f'<svg {size} style="{shrinks}" role="group" aria-label="{label}">{"".join((*lines, *dots, *boxes))}</svg>'


def _box(box: Box, place: Centre, number: int) -> str:
    x, y = place[0] - BOX_WIDTH // 2, place[1] - BOX_HEIGHT // 2
    adapted = "; ".join(a.short for a in box.adapters)
    said = text(", ".join(filter(None, (box.role, box.path, box.shape, adapted))))
    mark = f'<text class="m" x="{x + 7}" y="{y + 26}">{text(_short(adapted, 21))}</text>' if adapted else ""
    line = y + (14 if adapted else 20)
    return (
        f'<g class="s{" a" if adapted else ""}" tabindex="0" role="button" aria-pressed="false" data-i="{number}" '
        f'aria-label="{said}"><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
        f'style="fill:var(--{box.colour})"/>{_label(box.label, x + 7, line)}{mark}</g>'
    )


def _label(label: str, x: int, y: int) -> str:
    """Draw the name on a box. A name that is a little too long is squeezed."""
    squeezed = f' textLength="{BOX_WIDTH - 14}" lengthAdjust="spacingAndGlyphs"' if len(label) > _FITS else ""
    return f'<text x="{x}" y="{y}"{squeezed}>{text(_short(label, _SQUEEZED))}</text>'


def _short(value: str, most: int) -> str:
    return value if len(value) <= most else f"{value[: most - 1]}…"
