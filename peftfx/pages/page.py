"""One self-contained HTML file, to show in a notebook or to write."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from peftfx.files import write_file, writing


@dataclass(frozen=True)
class Page:
    """One HTML file without network access or a framework. It is dark if the reader's system is dark.

    Attributes:
        title: the title of the window.
        html: the whole HTML text.
    """

    title: str
    html: str = field(repr=False)

    def save(self, file: str | Path) -> Path:
        """Write the page to a `file`. An existing file is replaced.

        Raises:
            PeftfxError: the file cannot be written.
        """
        path = Path(file)
        with writing(path):
            write_file(path, lambda part: part.write_text(self.html, encoding="utf-8"))
        return path

    def _repr_html_(self) -> str:
        """Return a frame of its own for notebooks, so that the page's style stays inside."""
        style, inner = "width:100%;height:42em;border:0", text(self.html)
        return f'<iframe style="{style}" title="{text(self.title)}" srcdoc="{inner}"></iframe>'


def make_page(title: str, lead: str, body: str, data: object = None) -> Page:
    """Make a page with this body, and with data for its script.

    Args:
        title: the page's heading.
        lead: the line below the heading.
        body: the HTML of the body.
        data: values for JSON, which the page's script reads.
    """
    known = "" if data is None else f'<script type="application/json" id="data">{_data(data)}</script>'
    return Page(
        title,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{_file('page.css')}</style></head><body>"
        f"<header><h1>{text(title)}</h1><p>{text(lead)}</p></header>{body}{known}"
        f"<script>{_file('page.js')}</script></body></html>\n",
    )


def text(value: object) -> str:
    """Escape a value as text in HTML, also for attributes."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """Make an HTML table. Numbers are aligned to the right.

    If no column has a head, the first cell of each row names the row.
    """
    if not any(head):
        facts = (f'<tr><th scope="row">{text(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, *cells in rows)
        return f'<table class="facts"><tbody>{"".join(facts)}</tbody></table>'
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = ("".join(_cell(cell) for cell in row) for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def bars(values: dict[str, float], said: dict[str, str], caption: str, largest: float | None = None) -> str:
    """Make a table of numbers as bars beside their names. The text of each is in `said`.

    A bar of full length stands for `largest`, by default the largest value.
    """
    largest = (max(values.values(), default=0.0) if largest is None else largest) or 1.0
    rows = []
    for name, value in values.items():
        width = 100 * max(0.0, value) / largest
        drawn = f'<span class="bar" style="width:{width:.1f}%"></span>'
        cells = f'<td class="n">{text(said[name])}</td><td class="wide">{drawn}</td>'
        rows.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    return f'<table class="bars"><caption>{text(caption)}</caption><tbody>{"".join(rows)}</tbody></table>'


def _cell(value: object) -> str:
    kind = ' class="n"' if isinstance(value, (int, float)) else ""
    said = f"{value:,}" if isinstance(value, int) else f"{value:.2g}" if isinstance(value, float) else value
    return f"<td{kind}>{text(said)}</td>"


def _data(value: object) -> str:
    """Write a value as JSON that cannot close a script tag."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _file(name: str) -> str:
    lines = files("peftfx.pages").joinpath(name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.strip() for line in lines if line.strip() and not line.strip().startswith("//"))
