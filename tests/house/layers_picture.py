"""A picture of the layers, drawn from the imports of the files: `python tests/house/layers_picture.py > layers.svg`.

The picture is a dependency structure matrix. A row and a column stand for each layer, from the ground up. A dot says
that files of the row's layer import files of the column's layer; its area grows with the number of imports. All dots
lie below the diagonal, because imports run down the layers.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from math import sqrt

from house.structure import FACES, LAYERS, ROOT, SANCTIONED, Structure, level

CELL, LEFT, TOP = 15, 168, 170
STYLE = """
.layers text { font: 11px sans-serif; fill: currentColor }
.layers line { stroke: currentColor; opacity: .12 }
.layers .own { fill: currentColor; opacity: .12 }
.layers .down { fill: #4051b5 }
.layers .up { fill: #d1242f }
"""


def counted(structure: Structure) -> Counter[tuple[int, int]]:
    """How many imports run from one layer to another, by their numbers. Files that hand on names are left out."""
    edges = ((one, other) for one, other in structure.imports.edges if not FACES & {one, other})
    return Counter((level(one), level(other)) for one, other in edges)


def picture(structure: Structure) -> str:
    """Return the matrix as SVG. Text takes the page's own colour, so that the picture suits light and dark pages."""
    names = [name.removeprefix("peftfx.") for name in LAYERS]
    width, height = LEFT + CELL * len(names) + 8, TOP + CELL * len(names) + 8
    parts = []
    for place, name in enumerate(names):
        x, y = LEFT + CELL * (place + 0.5), TOP + CELL * (place + 0.5)
        parts += [
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<text transform="translate({x + 4},{TOP - 6}) rotate(-90)">{escape(name)}</text>',
            f'<line x1="{LEFT}" x2="{x}" y1="{y}" y2="{y}"/><line x1="{x}" x2="{x}" y1="{y}" y2="{height - 8}"/>',
        ]
    for (one, other), count in sorted(counted(structure).items()):
        x, y, radius = LEFT + CELL * (other + 0.5), TOP + CELL * (one + 0.5), min(1.2 + sqrt(count) * 0.7, CELL / 2)
        kind = "own" if one == other else "down" if other < one else "up"
        told = f"{names[one]} imports {names[other]}: {count}"
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius:.1f}"><title>{told}</title></circle>')
    return (
        f'<svg class="layers" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="The layers and the imports between them"><style>{STYLE}</style>{"".join(parts)}</svg>'
    )


def page(structure: Structure) -> str:
    """Return the site's page on the architecture: the picture, and what it shows in numbers."""
    down = sum(count for (one, other), count in counted(structure).items() if other < one)
    up = ", ".join(f"`{one}` imports `{other}`" for one, other in sorted(SANCTIONED))
    return f"""# Architecture

{len(structure.files)} files in {len(structure.folders())} folders. Each file is in one layer. A file imports only from
its own layer and from layers above it in this picture: {down} imports do so. The picture is drawn from the imports of
the files each time that this site is built. [Design](design.md#layers) says what each layer is for.

A row and a column stand for each layer, in the same order. A dot says that files of the row's layer import files of the
column's layer; a larger dot stands for more imports. Two imports run the other way, and are allowed by name: {up}.

{picture(structure)}

A test refuses an import against the layers, a circle of imports, and a folder of more than 15 files
(`tests/house/test_structure.py`). `python tests/house/structure.py` prints the same as text.
"""


if __name__ == "__main__":
    print(picture(Structure.of(ROOT)))
