"""Layout: the places of the boxes of a card, in rows below the boxes that they read, and the lines between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Edge = tuple[str, str]
Centre = tuple[int, int]

BOX_WIDTH, BOX_HEIGHT = 136, 32  #: the size of a box
_ACROSS, _DOWN, _EDGE, _LANE = 12, 20, 14, 7  #: gaps between boxes and between rows, the rim, and the gap between lanes
_LANES = 8  #: the number of lanes beside the boxes
_TALL = 10  #: the height of a row of joins
_MOST = 5  #: the most boxes in a row; a longer row continues below
_FEW = 3  #: the boxes in a row that moves a box which reads nothing to the row above


@dataclass(frozen=True)
class Arranged:
    """The places of everything, in pixels.

    Attributes:
        places: the middle of each box and join.
        lines: the edges, as paths of an SVG.
        width, height: the size of the drawing.
    """

    places: Mapping[str, Centre]
    lines: tuple[str, ...]
    width: int
    height: int


def lay_out(boxes: Sequence[str], joins: Sequence[str], beside: Sequence[str], edges: Sequence[Edge]) -> Arranged:
    """Place boxes and joins, each below all that it reads.

    Args:
        boxes: the names of the boxes, in the order in which they run.
        joins: the names of the sums.
        beside: boxes that no edge leads to; each is placed beside the box before it.
        edges: pairs of a name and the name that reads it.
    """
    rows = _rows(boxes, joins, beside, edges)
    inner = max(len(row) for row in rows) * (BOX_WIDTH + _ACROSS) - _ACROSS
    places, y, sums = dict[str, Centre](), 8, set(joins)
    for row in rows:
        tall = _TALL if sums.issuperset(row) else BOX_HEIGHT
        left = _EDGE + (inner - len(row) * (BOX_WIDTH + _ACROSS) + _ACROSS) // 2 + BOX_WIDTH // 2
        places |= {name: (left + i * (BOX_WIDTH + _ACROSS), y + tall // 2) for i, name in enumerate(row)}
        y += tall + _DOWN
    lanes = _lanes((edge for edge in edges if not _near(places, edge)), places)
    side = inner + 2 * _EDGE - 3
    lines = tuple(_line(places, edge, side + _LANE * lanes.get(edge, 0)) for edge in edges)
    return Arranged(places, lines, side + 3 + _LANE * max(lanes.values(), default=0), y - _DOWN + 8)


def _near(places: Mapping[str, Centre], edge: Edge) -> bool:
    """Return whether an edge passes no row."""
    return places[edge[1]][1] - places[edge[0]][1] <= BOX_HEIGHT + _DOWN


def _lanes(far: Iterable[Edge], places: Mapping[str, Centre]) -> dict[Edge, int]:
    """Choose a lane beside the boxes for each edge that passes rows.

    Two edges that pass the same row have different lanes, the shorter edge the inner one. When all lanes are taken,
    edges share the last.
    """
    found: dict[Edge, int] = {}
    lanes: list[list[tuple[int, int]]] = [[] for _ in range(_LANES)]
    spans = {edge: (places[edge[0]][1], places[edge[1]][1]) for edge in far}
    for edge, (top, bottom) in sorted(spans.items(), key=lambda item: item[1][1] - item[1][0]):
        free = (i for i, lane in enumerate(lanes) if all(end <= top or bottom <= start for start, end in lane))
        found[edge] = next(free, _LANES - 1)
        lanes[found[edge]].append((top, bottom))
    return found


def _line(places: Mapping[str, Centre], edge: Edge, side: int) -> str:
    """Draw a line from one place to another. A line that passes a row goes around on the right."""
    (ax, ay), (bx, by) = places[edge[0]], places[edge[1]]
    if _near(places, edge):
        return f"M{ax} {ay}C{ax} {(ay + by) // 2} {bx} {(ay + by) // 2} {bx} {by}"
    return (
        f"M{ax} {ay}C{side} {ay + 14} {side} {ay + 14} {side} {ay + 34}V{by - 34}"
        f"C{side} {by - 14} {side} {by - 14} {bx} {by}"
    )


def _rows(boxes: Sequence[str], joins: Sequence[str], beside: Sequence[str], edges: Sequence[Edge]) -> list[list[str]]:
    """Arrange the names in rows, each below all that it reads. A row that is too long continues in the next."""
    names = [*boxes, *joins]
    above: dict[str, list[str]] = {name: [] for name in names}
    below: dict[str, list[str]] = {name: [] for name in names}
    for start, end in edges:
        above[end].append(start)
        below[start].append(end)
    depth = _depths(names, above)
    for name in names:  # a box that reads nothing here is put just above its reader, such as keys of a cross-attention
        if not above[name] and below[name]:
            level = max(depth[name], min(depth[end] for end in below[name]) - 1)
            full = sum(depth[other] == level for other in names) >= _FEW
            depth[name] = max(level - full, 0)
    for name in beside:
        before = boxes[: boxes.index(name)]
        depth[name] = depth[before[-1]] if before else 0
    rows: list[list[str]] = []
    for level in sorted(set(depth.values())):
        row = [name for name in names if depth[name] == level]
        rows += [row[i : i + _MOST] for i in range(0, len(row), _MOST)]
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
