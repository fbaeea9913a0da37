"""`peftfx/__init__.pyi`, which tells editors what `peftfx.X` is: `python tests/house/public_stub.py` writes it.

The package finds its names when they are used; the stub is made from the same tables. A test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

import peftfx

STUB = Path(__file__).resolve().parents[2] / "peftfx" / "__init__.pyi"
HEAD = '"""Made by `python tests/house/public_stub.py`; what is public is told in `__init__.py`."""\n'


def stub() -> str:
    """The text of the stub."""
    homes = {"__version__": "peftfx.version", **peftfx._homes()}
    lines = sorted(f"from {home or 'peftfx'} import {name} as {name}" for name, home in homes.items())
    names = "".join(f'    "{name}",\n' for name in dir(peftfx))
    return f"{HEAD}\n" + "\n".join(lines) + f"\n\n__all__ = [\n{names}]\n"


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
