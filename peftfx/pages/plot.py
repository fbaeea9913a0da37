"""Plot a line of numbers as an SVG."""

from __future__ import annotations

from collections.abc import Sequence

from peftfx.pages.page import text

_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE = 640, 300, 58, 34, 12


def plot(points: Sequence[tuple[float, float]], up: str, across: str) -> str:
    """Make an SVG file of a line, with the ends of both axes labelled. Without points, the frame is empty."""
    finite = [(x, y) for x, y in points if y == y and abs(y) != float("inf")]
    xs, ys = [x for x, _ in finite] or [0.0], [y for _, y in finite] or [0.0]
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    wide, tall = _WIDTH - _LEFT - 12, _HEIGHT - _BELOW - _ABOVE

    def place(x: float, y: float) -> str:
        px = _LEFT + wide * (x - left) / ((right - left) or 1)
        py = _ABOVE + tall * (high - y) / ((high - low) or 1)
        return f"{px:.1f},{py:.1f}"

    line = " ".join(place(x, y) for x, y in finite)
    bottom, said = _ABOVE + tall, f"{up} over {across}, from {ys[0]:.4g} to {ys[-1]:.4g}"
    ends = [(8, _ABOVE + 8, f"{high:.4g}"), (8, bottom, f"{low:.4g}"), (_LEFT, bottom + 20, f"{across} {left:g}")]
    ends.append((_LEFT + wide - 40, bottom + 20, f"{right:g}"))
    words = "".join(f'<text x="{x}" y="{y}">{text(word)}</text>' for x, y, word in ends)
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{text(said)}">'
        f"<title>{text(said)}</title><style>text{{font:12px sans-serif;fill:#666}}</style>"
        f'<path d="M{_LEFT} {_ABOVE}V{bottom}H{_LEFT + wide}" fill="none" stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#0b62d6" stroke-width="1.5"/>{words}</svg>\n'
    )
